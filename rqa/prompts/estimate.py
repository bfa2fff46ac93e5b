"""Counting tokens where the tokenizer stays with its server, and what they cost."""

from collections.abc import Sequence

from rqa.runtime.errors import UserError

BYTES_PER_TOKEN = 3  # English prose has four to five, code and most other scripts about three: too early, not too late


class EstimatedTokens:
    """Stands where a `Prompter` expects a tokenizer, and only counts: a token every three bytes of UTF-8."""

    chat_template = None
    bos_token_id = None
    eos_token_id = 0
    all_special_ids: tuple[int, ...] = ()
    added_tokens_decoder: dict[int, str] = {}  # noqa: RUF012

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """As many ids as the text is thought to have tokens; they mean nothing."""
        return [0] * -(-len(text.encode("utf-8", "replace")) // BYTES_PER_TOKEN)


def count_tokens(conversations: Sequence[Sequence[dict[str, str]]]) -> int:
    """About how many tokens conversations have, `{"role", "content"}` a turn."""
    return sum(len(EstimatedTokens().encode(turn["content"])) for turns in conversations for turn in turns)


def check_price(flag: str, price: Sequence[float]) -> None:
    """Raises:
    UserError: there are prices, and not two.
    """
    if len(price) not in (0, 2) or min(price, default=0) < 0:
        raise UserError(f"--{flag}: takes two numbers, dollars for a million tokens in and out")


def cost(asked: str, given: int, written: int, price: Sequence[float]) -> str:
    """What asking will take at most, in tokens and, at a price for a million in and out, in dollars."""
    dollars = f", at most ${(given * price[0] + written * price[1]) / 1e6:.2f}" if price else ""
    return f"{asked}, some {given:,} tokens in, at most {written:,} out{dollars}; what is kept already costs nothing"
