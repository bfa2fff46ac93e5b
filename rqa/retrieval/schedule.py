"""When the documents are encoded again in training, and how many of them: RPG's, EMDR2's and mining's flags."""

import re
from dataclasses import dataclass, field

from rqa.models.encoder import Encoder
from rqa.runtime.errors import UserError, check_bounds


@dataclass
class RefreshArguments:
    """When documents are encoded again in training, and how many of them."""

    refresh_step: str = field(
        default="10", metadata={"help": 'Steps between two refreshes of the index, or "0-100:10,100-900:50".'}
    )
    refresh_fraction: float = field(
        default=1.0,
        metadata={
            "help": "Share of the documents that a refresh encodes: up to one half those found most often since the "
            "last one, otherwise those whose embeddings are oldest."
        },
    )
    refresh_async: bool = field(
        default=False,
        metadata={"help": "Encode on a copy of the weights while training goes on; swap the index when ready."},
    )
    train_query_encoder_only: bool = field(
        default=False,
        metadata={"help": "Passages keep the initial encoder, which is saved beside the trained one; no refresh."},
    )

    def __post_init__(self) -> None:
        parse_schedule(self.refresh_step)
        check_bounds(self, "refresh_fraction", above=0, at_most=1)
        if self.train_query_encoder_only and self.cheaper:
            raise UserError(f"--train_query_encoder_only true: documents never change; leave out --{self.cheaper}")

    @property
    def cheaper(self) -> str:
        """The flag that makes a refresh cheaper; empty if there is none."""
        return "refresh_async" if self.refresh_async else "refresh_fraction" if self.refresh_fraction < 1 else ""

    def freeze_passages(self, encoder: Encoder) -> None:
        """Let passages keep the encoder that they have now, if that is asked for.

        Raises:
            UserError: the model's passages are frozen already, and all of it is to be trained.
        """
        if self.train_query_encoder_only:
            encoder.freeze_passages()
        elif encoder.passage_encoder:
            raise UserError(
                "--model_name_or_path: holds a passage encoder of its own, which stays as it is; "
                "train its encoder of questions with --train_query_encoder_only true"
            )


def parse_schedule(schedule: str) -> list[tuple[int, float, int]]:
    """Spans of (first step, end, interval).

    Raises:
        UserError: it is neither a number of steps nor a list of spans.
    """
    spans = []
    for part in schedule.split(","):
        match = re.fullmatch(r"\s*(?:(\d+)-(\d+):)?(\d+)\s*", part)
        if not match or int(match[3]) < 1 or (match[1] and int(match[1]) >= int(match[2])):
            raise UserError(f'--refresh_step {schedule}: write a number of steps, or "0-100:10,100-1000:100"')
        spans.append((int(match[1] or 0), float(match[2] or "inf"), int(match[3])))
    return spans
