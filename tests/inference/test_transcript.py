"""What is printed while text grows, and what is left for the end."""

import io

from pikv_megatron.inference.stopping import StopCriteria
from pikv_megatron.inference.transcript import Transcript


class Bytes:
    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


def transcript_of(prompts, stops, is_streamed):
    out = io.StringIO()
    criteria = StopCriteria([0], stops, Bytes())
    return Transcript(prompts, criteria, out, is_streamed), out


def test_streamed_text_is_whole_once_and_cut_at_its_stop():
    transcript, out = transcript_of(["Say: "], ["END"], True)
    seen = [out.getvalue()]
    for byte in "é EEND".encode():
        transcript.add([byte])
        seen.append(out.getvalue())
    assert seen[:4] == ["Say: ", "Say: ", "Say: é", "Say: é "]
    assert transcript.finish() == ["é E"] and out.getvalue() == "Say: é E\n"


def test_what_was_held_back_is_printed_in_the_end():
    transcript, out = transcript_of(["a"], ["END"], True)
    for byte in b"bEN\xe2":
        transcript.add([byte])
    assert out.getvalue() == "ab"
    assert transcript.finish() == ["bEN\ufffd"] and out.getvalue() == "abEN\ufffd\n"


def test_several_texts_are_printed_in_the_end():
    transcript, out = transcript_of(["a", "b"], [], False)
    for tokens in ([99, 100], [None, 101], [0, 102]):
        transcript.add(tokens)
    assert out.getvalue() == ""
    assert transcript.finish() == ["c", "def"] and out.getvalue() == "ac\n\nbdef\n\n"
