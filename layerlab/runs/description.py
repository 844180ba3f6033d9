"""What MLflow's page of a notebook's run says of it first."""

from __future__ import annotations

from collections.abc import Sequence

from layerlab.contract.claims import ClaimResult
from layerlab.contract.rows import scoreboard_texts
from layerlab.runs.tracking import LONGEST_TAG
from layerlab.show.interval import with_minus
from layerlab.show.table import Table, markdown_text

# The tag that the page shows as the run's description, in Markdown.
DESCRIPTION = "mlflow.note.content"
# Of the scoreboard, as many columns as the page has room for.
COLUMNS = ("claim", "paper", "measured", "verdict")


def answer_tags(sentence: str, claims: Sequence[ClaimResult] = ()) -> dict[str, str]:
    """A notebook's answer as tags of its run: the sentence, and what MLflow's page shows as the run's description.

    Args:
        sentence: of any length; what MLflow does not take is cut.
        claims: that the description has a row for, where MLflow takes it.
    """
    told = sentence[:LONGEST_TAG]
    rows = [[row[column] for column in COLUMNS] for row in scoreboard_texts(claims)]
    table = with_minus(Table(COLUMNS, rows).markdown()) if rows else ""
    described = f"{markdown_text(sentence)}\n\n{table}".strip()
    return {"answer": told, DESCRIPTION: described if len(described) <= LONGEST_TAG else told}
