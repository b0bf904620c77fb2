"""From a picture to one stream of embeddings for each injected decoder layer."""
