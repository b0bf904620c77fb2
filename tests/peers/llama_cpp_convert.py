"""Runs llama.cpp's own converter on a checkpoint whose tokenizer it does not know by hash.

    python -m tests.peers.llama_cpp_convert LLAMA_CPP_SOURCE CHECKPOINT OUT.gguf --outtype bf16 [--mmproj]

LLAMA_CPP_SOURCE is a source tree with convert_hf_to_gguf.py in it (llama-cpp-python's source package has one under
vendor/llama.cpp). Only the name of the pre-tokenizer is supplied here; the rest is the converter's own work.
"""

from __future__ import annotations

import sys
from pathlib import Path

SPLIT = "dbrx"  # digits in groups of up to three, like the toy tokenizer and the published one


def _no_sentencepiece(self: object, add_to_gguf: bool = True) -> None:
    """Skips SentencePiece, which the converter tries first and which needs its package; these tokenizers are BPE."""
    raise FileNotFoundError("tokenizer.model")


def main() -> None:
    source, arguments = Path(sys.argv[1]).resolve(), sys.argv[2:]
    if not (source / "convert_hf_to_gguf.py").is_file():
        raise SystemExit(f"'{source}' has no convert_hf_to_gguf.py; give llama.cpp's source tree.")
    checkpoint, outfile, *rest = arguments
    sys.path.insert(0, str(source))
    sys.argv = ["convert_hf_to_gguf.py", checkpoint, "--outfile", outfile, *rest]
    import convert_hf_to_gguf
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: SPLIT
    TextModel._set_vocab_sentencepiece = _no_sentencepiece
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main()
