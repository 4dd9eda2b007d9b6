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
        self._context = self._read = 0       # tokens before _read are text; those from _context on are read again, for a
        self._before = ""                    # tokenizer may look back: this is what they gave
        self._held = ""                      # text, but perhaps the beginning of a stop string

    def add(self, token: int) -> bool:
        """Take one more token; True when a stop string is complete."""
        self._tokens.append(token)
        end = len(self._tokens)
        text = self.tokenizer.decode(self._tokens[self._context:])
        if text.endswith("\ufffd"):                          # a character cut short, of which three bytes at most are there
            if (end := end - 3) <= self._read:
                return False
            text = self.tokenizer.decode(self._tokens[self._context:end])
        return self._take(text, end)

    def flush(self) -> None:
        """No more tokens: give out what was held back."""
        if not self._take(self.tokenizer.decode(self._tokens[self._context:]), len(self._tokens)):
            self.text, self._held = self.text + self._held, ""

    def _take(self, text: str, end: int) -> bool:
        if new := text[len(self._before):]:
            self._held += new
            self._context, self._read = self._read, end
            self._before = self.tokenizer.decode(self._tokens[self._context:end])
        found = [at for s in self.stop if (at := self._held.find(s)) >= 0]
        held = max((n for s in self.stop for n in range(1, len(s)) if self._held.endswith(s[:n])), default=0)
        cut = min(found, default=len(self._held) - held)
        self.text, self._held = self.text + self._held[:cut], "" if found else self._held[cut:]
        return bool(found)
