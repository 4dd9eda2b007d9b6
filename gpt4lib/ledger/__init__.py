"""The claims of the notes, their recomputation, their verdicts."""

from gpt4lib.ledger.claims import Claim, claim, load
from gpt4lib.ledger.judge import VERDICTS, Judgement, judge, tally

__all__ = ["VERDICTS", "Claim", "Judgement", "claim", "judge", "load", "tally"]
