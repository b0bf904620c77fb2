"""From a prompt and pictures to text: template, tokens, decode loop, sampling."""
