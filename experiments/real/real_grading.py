"""Is an answer right? The check that its item carries, run by the graders of `mergekit_wp`.

Of an instruction more than the check is asked: five words at least, or a model that says nothing would follow "do not
use commas".
"""

from __future__ import annotations

import json
from typing import Any

from mergekit_wp.scoring.anchor.graders import parse_check

_FEWEST_WORDS = 5


def right(capability: str, text: str, check: dict[str, Any]) -> bool:
    """Whether `text` passes the check, and of an instruction whether it says anything."""
    if capability == "instruction" and len(text.split()) < _FEWEST_WORDS:
        return False
    return parse_check(check, "check").passes(text)


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """lm-eval's hook: one row of a task file and the generated text to {"acc": 0 or 1}.

    An instruction also counts for the accuracy of its own type, such as "acc_title".
    """
    found = float(right(doc["capability"], results[0].strip(), json.loads(doc["grading"])))
    return {"acc": found} | ({f"acc_{doc['task']}": found} if doc["capability"] == "instruction" else {})
