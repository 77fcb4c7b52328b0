"""The text that is learned, and the text that is kept aside."""

import sysconfig
from pathlib import Path

from pikv_megatron.demo.corpus import is_held_out, load_corpus, stdlib_sources
from pikv_megatron.demo.tokenizer import EOS_ID, NUM_BYTES


def test_splits_are_disjoint_and_in_a_fixed_order():
    train, held_out = stdlib_sources(held_out=False), stdlib_sources(held_out=True)
    assert train and held_out and not set(train) & set(held_out)
    assert train == sorted(train) == stdlib_sources(held_out=False)
    folders = {part for path in train + held_out for part in path.parts}
    assert not folders & {"site-packages", "test", "tests", "__pycache__"}


def test_a_file_keeps_its_side_whatever_else_is_there():
    sides = {name: is_held_out(name) for name in ("textwrap.py", "sched.py", "html/parser.py")}
    assert sides == {"textwrap.py": False, "sched.py": True, "html/parser.py": True}


def test_tokens_are_the_bytes_of_the_files_each_closed():
    tokens = load_corpus(held_out=True)
    paths = stdlib_sources(held_out=True)
    assert (tokens == EOS_ID).sum() == len(paths) and tokens.max() == EOS_ID
    first = Path(sysconfig.get_path("stdlib"), paths[0]).read_bytes()
    assert bytes(tokens[: len(first)].tolist()) == first and tokens[len(first)] == EOS_ID
    assert (tokens[tokens != EOS_ID] < NUM_BYTES).all()
