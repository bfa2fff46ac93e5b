"""Text and JSON from outside: checked and repaired once, where they enter."""

import json
import math
import re
import string
import unicodedata
from collections.abc import Callable
from functools import partial
from typing import Any

import regex

LONGEST = 2**28  # maximum bytes of a JSON file, or of a line
DEEPEST = 100  # maximum levels of JSON; deeper values would exceed Python's recursion limit
_ASCII = re.compile(r"[\t\n\r -~]*").fullmatch
_SIGNS = "".join(chr(code) * 2 for code in range(33, 127))
_BETWEEN_SIGNS = regex.compile(r"^[\p{P}\p{S}].|.[\p{P}\p{S}]$").search
_ALIKE = str.maketrans("‘’ʻʼ´“”„‐‑–−", "'" * 5 + '"' * 3 + "-" * 4)
_ALIKE |= str.maketrans({"—": " - ", "，": ", ", "、": ", "})  # these separate words without a space
_INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}+")
_PUNCTUATION = regex.compile(r"[\p{P}\p{Sc}\p{Sk}\p{Sm}]+")  # in ASCII, `string.punctuation`
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Tibetan}\p{Line_Break=SA}]"  # SA: Thai, Lao, Khmer, ...
_CHARACTER = rf"[{_UNSPACED}&&[\p{{L}}\p{{N}}]][\p{{M}}ー]*"
_PAIR = regex.compile(_CHARACTER * 2, regex.V1)
_WORD = regex.compile(rf"[\w--{_UNSPACED}]+|{_CHARACTER}|\p{{So}}\p{{M}}*", regex.V1)  # regex's \w includes marks
_ASCII_WORD = re.compile(r"\w+")  # the same for ASCII text, five times as fast
# Marks around reasoning: those of most models, Magistral's, and gpt-oss's channels (the final one is the answer).
_THOUGHTS_BEGIN = re.compile(r"<think(?:ing)?>|\[think\]|<\|channel\|>", re.IGNORECASE)
_THOUGHTS_END = re.compile(r"</think(?:ing)?>|\[/think\]|<\|channel\|>final(?:<\|message\|>)?", re.IGNORECASE)
_APART = regex.compile(rf"{_CHARACTER}|[\p{{P}}--\p{{ASCII}}]", regex.V1)


def clean_text(text: str) -> str:
    """Text that UTF-8 can encode: surrogate pairs are joined, and a lone surrogate becomes U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def plain(text: str) -> str:
    """Text in NFKC, with ASCII quotes and dashes, and without invisible characters such as soft hyphens."""
    return text if text.isascii() else unicodedata.normalize("NFKC", _INVISIBLE.sub("", text.translate(_ALIKE)))


def words(text: str, joined: bool = False, pairs: bool = False) -> list[str]:
    """The words of a text for comparisons, case-folded; single characters in scripts without spaces between words.

    `joined` makes one word of "U.S." and of "don't"; `pairs` adds all pairs of adjacent characters of such scripts.
    """
    text = plain(text).casefold()
    found = (_ASCII_WORD if text.isascii() else _WORD).findall(_PUNCTUATION.sub("", text) if joined else text)
    return found + _PAIR.findall(text, overlapped=True) if pairs and not text.isascii() else found


def spaced(text: str) -> str:
    """Plain text with spaces around words that English tokenizers would not separate; ASCII text is unchanged."""
    return text if text.isascii() else _APART.sub(r" \g<0> ", plain(text))


def without_thoughts(reply: str) -> str:
    """The part of a reply after its last end-of-thoughts mark; "" if that part begins to think again."""
    answer = _THOUGHTS_END.split(reply)[-1].strip()
    return "" if _THOUGHTS_BEGIN.search(answer) else answer


def added(text: str, shown: str) -> str:
    """The part of a growing reply that is new, given what was shown; all of it if thoughts were shown before.

    Decoders that correct spaces may change the last letters shown; those stay as they are.
    """
    return text[len(shown) :] if text.startswith(shown[: len(shown) // 2]) else text


def as_text(tokenizer: Any) -> Callable[[str], str]:
    """A function that keeps text free of this tokenizer's control tokens: a space breaks them, or replaces a character.

    Control tokens are the special ones, and added ones between signs, such as `<think>`; added words stay whole.
    """
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    forms = [str, normalizer.normalize_str] if normalizer else [str]  # tokens may match in lower case, or after NFKC
    added = ((token, each.content.strip(), each.special) for token, each in tokenizer.added_tokens_decoder.items())
    control = {token: name for token, name, special in added if name and (special or _BETWEEN_SIGNS(name))}
    names = {form(name) for name in control.values() for form in forms} - {"", *string.punctuation}  # "!" may pad
    begins = re.compile("|".join(sorted({re.escape(name[:3]) for name in names})), re.IGNORECASE).search
    keeps_ascii = forms[-1](_SIGNS).lower().endswith(_SIGNS.lower())

    def sanitized(text: str) -> str:
        if keeps_ascii and _ASCII(text) and not begins(text):
            return text  # saves normalizing, which costs a fifth of tokenizing
        for form in forms:
            seen = broken = form(text)
            if begins(seen) and not control.keys().isdisjoint(tokenizer.encode(text, add_special_tokens=False)):
                for name in sorted(names, key=len):
                    broken = broken.replace(name, f"{name[:-1]} {name[1:][-1:]}")
                text = text if broken == seen else broken
        return text

    return sanitized if control else str


def parse_json(text: str | bytes, kind: type = dict) -> Any:
    """The value of this kind in JSON from outside; a ValueError says what is wrong with it.

    Numbers are finite (NaN and infinities, which are not JSON, become null), text is clean, and nesting is limited.
    """
    if len(text) > LONGEST:
        raise ValueError(f"longer than {LONGEST >> 20} MiB")
    text = clean_text(text) if isinstance(text, str) else text.decode("utf-8-sig")
    try:
        value = _STRICT.decode(text)
        if text.count("[") + text.count("{") > DEEPEST and _depth(value) > DEEPEST:
            raise RecursionError
        if "\\ud" in text or "\\uD" in text:
            value = json.loads(clean_text(json.dumps(value, ensure_ascii=False)))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, kind):
        named = {dict: "object", list: "array"}[kind]
        raise ValueError(f"expected a JSON {named}, found {type(value).__name__}")
    return value


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max(map(_depth, inner), default=0) if isinstance(value, dict | list) else 0


def finite(kind: type, text: str) -> Any:
    """The number of this kind in a text; a ValueError for NaN, infinities and numbers too large for a float."""
    if not math.isfinite(float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return kind(text)


_STRICT = json.JSONDecoder(parse_float=partial(finite, float), parse_int=partial(finite, int), parse_constant={}.get)
