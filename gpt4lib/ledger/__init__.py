"""The claims of the notes, their recomputation, their verdicts."""

from gpt4lib.ledger.claims import Claim, claim, load
from gpt4lib.ledger.constraints import constraints
from gpt4lib.ledger.judge import VERDICTS, Judgement, judge, tally
from gpt4lib.ledger.render import as_json, detail, table

__all__ = ["VERDICTS", "Claim", "Judgement", "as_json", "claim", "constraints", "detail", "judge", "load", "table", "tally"]
