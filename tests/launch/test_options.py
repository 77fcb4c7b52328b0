"""The command line, refused with one line before anything is loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_directory import EOS, MAX_LENGTH, byte_tokenizer, save_tiny_mixtral
from tokenizers import processors
from transformers import AutoTokenizer

from pikv_megatron.inference.options import parse_options
from pikv_megatron.inference.sampling import SamplingParams

ROOT = Path(__file__).parents[2]
DEEPSPEED_CONFIG = ROOT / "configs/deepspeed/inference.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_tiny_mixtral(directory)
    return directory


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def parse(model, *arguments):
    return parse_options(["--local_rank=0", "--model", str(model), *arguments], DEEPSPEED_CONFIG)


def test_defaults(model):
    options = parse(model, "--prompt", "ab")
    assert options.prompts == ["ab"] and len(options.prompt_ids[0]) == 2
    assert options.sampling == SamplingParams() and options.max_new_tokens == 64
    assert options.expert_parallel_size == options.tensor_parallel_size == 1
    assert options.deepspeed["replace_with_kernel_inject"] is False
    expected = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    assert options.dtype == options.deepspeed["dtype"] == expected


def test_everything_given(model, tmp_path):
    (tmp_path / "prompts.txt").write_text("first é\nsecond\n", encoding="utf-8")
    options = parse(
        model, "--prompt", "zero", "--prompt-file", str(tmp_path / "prompts.txt"),
        "--max-new-tokens", "5", "--temperature", "0.5", "--top-k", "3", "--top-p", "0.9",
        "--repetition-penalty", "1.2", "--seed", "7", "--stop", "END", "--stop", "\n",
        "--dtype", "bfloat16", "--output", str(tmp_path / "out.jsonl"), "--timeout", "9",
        "--pikv", str(ROOT / "configs/pikv/lossless.yaml"),
    )
    assert options.prompts == ["zero", "first é", "second"]
    assert options.stop_strings == ["END", "\n"] and options.timeout == 9.0
    assert options.sampling == SamplingParams(
        temperature=0.5, top_k=3, top_p=0.9, repetition_penalty=1.2, seed=7
    )
    assert options.dtype == torch.bfloat16 and options.output == tmp_path / "out.jsonl"


def test_ranks_that_tensor_parallelism_leaves_share_the_experts(model, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert parse(model, "--prompt", "a").expert_parallel_size == 4
    two = parse(model, "--prompt", "a", "--tensor-parallel-size", "2")
    assert two.expert_parallel_size == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--prompt"),
        (["--prompt", ""], "--prompt 1 is empty"),
        (["--prompt", "a", "--prompt", "b\udcff"], "--prompt 2: text is not valid Unicode"),
        (["--prompt", "--stop", "a"], "--prompt"),
        (["--prompt", "a", "--chat"], "no chat template"),
        (["--prompt-file", "/does/not/exist"], "--prompt-file /does/not/exist"),
        (["--prompt", "a", "--dtype", "int4"], "int4"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature -1"),
        (["--prompt", "a", "--temperature", "warm"], "--temperature"),
        (["--prompt", "a", "--top-k", "-2"], "--top-k -2"),
        (["--prompt", "a", "--top-p", "0"], "--top-p 0"),
        (["--prompt", "a", "--repetition-penalty", "0"], "--repetition-penalty 0"),
        (["--prompt", "a", "--stop", ""], "--stop"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["--prompt", "a", "--max-new-tokens", str(MAX_LENGTH + 1)], "max_sequence_length"),
        (["--prompt", "a" * MAX_LENGTH, "--max-new-tokens", "2"], "prompt 1 has 256 tokens"),
        (["--prompt", "a", "--timeout", "nan"], "--timeout"),
        (["--prompt", "a", "--output", "/does/not/exist/out.jsonl"], "--output"),
        (["--prompt", "a", "--pikv", "/does/not/exist.yaml"], "/does/not/exist.yaml"),
        (["--prompt", "a", "--deepspeed-config", "/does/not/exist.json"], "--deepspeed-config"),
        (["--prompt", "a", "--expert-parallel-size", "2"], "must divide the 1 ranks"),
        (["--prompt", "a", "--tensor-parallel-size", "4"], "must divide"),
        (["--prompt", "a", "--speed", "9"], "--speed"),
    ],
)
def test_refuses(model, arguments, message):
    with pytest.raises(ValueError) as error:
        parse(model, *arguments)
    assert message in str(error.value)


def test_refuses_ranks_that_the_experts_cannot_fill(model, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="4 experts"):
        parse(model, "--prompt", "a")


def test_a_prompt_may_begin_with_a_dash_or_be_of_spaces(model):
    prompts = ["-x", "--- a", "  ", "--"]
    named = [part for prompt in prompts for part in ("--prompt", prompt)]
    options = parse(model, *named, "--stop", "->", "--stop", "--", "--stop=--")
    assert options.prompts == prompts and options.stop_strings == ["->", "--", "--"]
    assert options.prompt_ids[2] == options.tokenizer.encode("  ")


def test_lines_of_a_prompt_file_end_with_line_feeds_only(model, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffone\r\ntwo\u2028\x0bstill two\n".encode())
    options = parse(model, "--prompt-file", str(tmp_path / "prompts.txt"))
    assert options.prompts == ["one", "two\u2028\x0bstill two"]


def with_files(model: Path, directory: Path, **files: dict) -> Path:
    """The model's directory with other small files."""
    shutil.copytree(model, directory)
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def test_special_tokens_can_be_left_to_the_prompt(model, tmp_path):
    backend = byte_tokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", EOS)]
    )
    directory = with_files(model, tmp_path / "model")
    backend.save(str(directory / "tokenizer.json"))
    twice = parse(directory, "--prompt", "<|end|>a").prompt_ids[0]
    once = parse(directory, "--prompt", "<|end|>a", "--no-special-tokens").prompt_ids[0]
    assert twice[:2] == [EOS, EOS] and once == twice[1:]


def test_a_tokenizer_of_another_model_is_noticed_before_loading(model, tmp_path):
    directory = with_files(model, tmp_path / "model")
    backend = byte_tokenizer()
    backend.add_special_tokens(["<|beyond|>"])
    backend.save(str(directory / "tokenizer.json"))
    parse(directory, "--prompt", "a")
    with pytest.raises(ValueError, match="--prompt 1 has token 257.*vocab_size is 257"):
        parse(directory, "--prompt", "a<|beyond|>")


def test_sampling_is_what_the_models_makers_chose_unless_said_otherwise(model, tmp_path):
    made = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.05}
    directory = with_files(model, tmp_path / "drawn", generation_config=made)
    expected = SamplingParams(temperature=0.7, top_k=50, top_p=0.9, repetition_penalty=1.05)
    assert parse(directory, "--prompt", "a").sampling == expected
    changed = parse(directory, "--prompt", "a", "--temperature", "0", "--top-k", "0").sampling
    assert changed.is_greedy and changed.top_k == 0 and changed.top_p == 0.9
    inert = {"temperature": 0.7, "top_k": 20}
    directory = with_files(model, tmp_path / "greedy", generation_config=inert)
    assert parse(directory, "--prompt", "a").sampling == SamplingParams()
    broken = {"do_sample": True, "temperature": "warm"}
    directory = with_files(model, tmp_path / "broken", generation_config=broken)
    with pytest.raises(ValueError, match="generation_config.json: temperature warm"):
        parse(directory, "--prompt", "a")


def test_chat_puts_the_prompt_into_the_models_template(model, tmp_path):
    template = "{{ bos_token }}{% for m in messages %}\n[{{ m.role }}] {{ m.content | trim }}" \
        "{% endfor %}{% if add_generation_prompt %}\n[assistant] {% endif %}"
    config = {"chat_template": template, "bos_token": "<|end|>"}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    directory = with_files(model, tmp_path / "model", tokenizer_config=config)
    options = parse(directory, "--prompt", " hello ", "--chat")
    reference = AutoTokenizer.from_pretrained(directory)
    ids = reference.apply_chat_template(
        [{"role": "user", "content": " hello "}], add_generation_prompt=True, return_dict=False
    )
    assert options.prompt_ids == [ids] and ids[0] == EOS and options.prompts == [" hello "]
    (directory / "chat_template.jinja").write_text("{{ raise_exception('no users') }}")
    with pytest.raises(ValueError, match="--prompt 1: chat_template: no users"):
        parse(directory, "--prompt", "a", "--chat")


def test_refuses_an_empty_line_of_a_prompt_file(model, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\nthree\n")
    with pytest.raises(ValueError, match="line 2 is empty"):
        parse(model, "--prompt-file", str(tmp_path / "prompts.txt"))


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_refuses_a_directory_that_lacks_a_file(model, tmp_path, missing):
    directory = tmp_path / "model"
    shutil.copytree(model, directory)
    (directory / missing).unlink()
    with pytest.raises(ValueError, match=missing.replace("model.", r"\*.")):
        parse(directory, "--prompt", "a")


def test_refuses_a_missing_directory_and_a_broken_deepspeed_config(model, tmp_path):
    with pytest.raises(ValueError, match="no such directory"):
        parse(tmp_path / "nowhere", "--prompt", "a")
    for content in ("{", json.dumps([1])):
        (tmp_path / "ds.json").write_text(content)
        with pytest.raises(ValueError, match="--deepspeed-config"):
            parse(model, "--prompt", "a", "--deepspeed-config", str(tmp_path / "ds.json"))


def test_help_is_printed_by_the_first_rank_only(model, monkeypatch, capsys):
    for rank, is_printed in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop:
            parse(model, "--help")
        assert stop.value.code == 0
        assert ("--max-new-tokens" in capsys.readouterr().out) == is_printed
