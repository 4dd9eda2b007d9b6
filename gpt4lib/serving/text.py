"""Tokens as text while they are still coming: whole characters only, and nothing that may yet prove to be a stop."""

from typing import Collection, Protocol, Sequence


class Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: Sequence[int]) -> str: ...


class Bytes:
    """Every byte of UTF-8 is a token; what is no UTF-8 decodes to U+FFFD."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(t for t in tokens if t < 256).decode(errors="replace")


class TextStream:
    """The text of one answer. `text` is what can be shown: it never shrinks, and ends before the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Collection[str] = ()) -> None:
        self.tokenizer, self.stop, self.text = tokenizer, stop, ""
        self._tokens: list[int] = []
        self._read = 0           # tokens decoded for good; the few before them are context for those that follow
        self._context = 0
        self._held = ""          # decoded, but perhaps the beginning of a stop string

    def add(self, token: int) -> bool:
        """Take one more token; True when a stop string is complete."""
        self._tokens.append(token)
        return not self._decode().endswith("\ufffd") and self._take()           # that end may be half a character

    def flush(self) -> None:
        """No more tokens: give out what was held back."""
        if not self._take():
            self.text, self._held = self.text + self._held, ""

    def _decode(self) -> str:
        return self.tokenizer.decode(self._tokens[self._context:])

    def _take(self) -> bool:
        before = self.tokenizer.decode(self._tokens[self._context:self._read])
        if new := self._decode()[len(before):]:
            self._held += new
            self._context, self._read = self._read, len(self._tokens)
        found = [at for s in self.stop if (at := self._held.find(s)) >= 0]
        held = max((n for s in self.stop for n in range(1, len(s)) if self._held.endswith(s[:n])), default=0)
        cut = min(found, default=len(self._held) - held)
        self.text, self._held = self.text + self._held[:cut], "" if found else self._held[cut:]
        return bool(found)
