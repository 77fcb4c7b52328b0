"""A sequence of the engine. Every rank of the expert-parallel group keeps all of them."""

from dataclasses import dataclass

from pikv_megatron.cache.step.step_rows import CachedSequence
from pikv_megatron.inference.request import Request


@dataclass
class LiveSequence:
    """A request and how far it has come.

    Attributes:
        id: the engine's name for it.
        home: home rank in the expert-parallel group.
        cached: its part of the cache.
        request: what was asked.
        pending: tokens to be fed: the prompt at first, then the token chosen last.
        history: all its tokens, for the repetition penalty.
        num_new: tokens chosen for this request.
    """

    id: int
    home: int
    cached: CachedSequence
    request: Request
    pending: list[int]
    history: list[int]
    num_new: int = 0

    @classmethod
    def begin(
        cls, sequence_id: int, home: int, cached: CachedSequence, request: Request
    ) -> "LiveSequence":
        """A sequence of which nothing is cached yet."""
        prompt = list(request.prompt)
        return cls(sequence_id, home, cached, request, prompt, list(prompt))

    def next_turn(self, request: Request) -> "LiveSequence":
        """The same cached sequence with a new prompt, behind what is still to be fed."""
        prompt = list(request.prompt)
        return LiveSequence(
            self.id, self.home, self.cached, request, self.pending + prompt, self.history + prompt
        )

    @property
    def is_decoding(self) -> bool:
        """Whether its prompt was fed."""
        return self.num_new > 0

    @property
    def num_tokens(self) -> int:
        """Tokens in the cache and those to be fed."""
        return self.cached.length + len(self.pending)

    @property
    def final_length(self) -> int:
        """Most tokens that it can come to."""
        return self.num_tokens + self.request.max_new_tokens - self.num_new

    def take(self, token: int) -> str:
        """Append the chosen token; why the sequence ends with it, empty where it goes on."""
        self.pending = [token]
        self.history.append(token)
        self.num_new += 1
        if self.request.stop is not None and self.request.stop(token):
            return "stop"
        return "length" if self.num_new == self.request.max_new_tokens else ""
