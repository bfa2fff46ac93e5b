"""Text and JSON from outside: checked and mended once, where they enter."""

import json
import math
import re
import string
import unicodedata
from collections.abc import Callable
from functools import partial
from typing import Any

import regex

LONGEST = 2**28  # bytes of a JSON file, or of a line
DEEPEST = 100  # levels of JSON: what is deeper breaks whatever walks through it by recursion
_ASCII = re.compile(r"[\t\n\r -~]*").fullmatch
_SIGNS = "".join(chr(code) * 2 for code in range(33, 127))
_BETWEEN_SIGNS = regex.compile(r"^[\p{P}\p{S}].|.[\p{P}\p{S}]$").search
_ALIKE = str.maketrans("‘’ʻʼ´“”„‐‑–−", "'" * 5 + '"' * 3 + "-" * 4)
_ALIKE |= str.maketrans({"—": " - ", "，": ", ", "、": ", "})  # they part words without a space
_INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}+")
_PUNCTUATION = regex.compile(r"[\p{P}\p{Sc}\p{Sk}\p{Sm}]+")  # in ASCII, `string.punctuation`
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Tibetan}\p{Line_Break=SA}]"  # SA: Thai, Lao, Khmer, ...
_CHARACTER = rf"[{_UNSPACED}&&[\p{{L}}\p{{N}}]][\p{{M}}ー]*"
_PAIR = regex.compile(_CHARACTER * 2, regex.V1)
_WORD = regex.compile(rf"[\w--{_UNSPACED}]+|{_CHARACTER}|\p{{So}}\p{{M}}*", regex.V1)  # its \w holds marks, too
_ASCII_WORD = re.compile(r"\w+")  # the same there, in a fifth of the time
# Marks of thoughts: those of most models, Magistral's, and gpt-oss's channels, of which the final one is the answer.
_THOUGHTS_BEGIN = re.compile(r"<think(?:ing)?>|\[think\]|<\|channel\|>", re.IGNORECASE)
_THOUGHTS_END = re.compile(r"</think(?:ing)?>|\[/think\]|<\|channel\|>final(?:<\|message\|>)?", re.IGNORECASE)
_APART = regex.compile(rf"{_CHARACTER}|[\p{{P}}--\p{{ASCII}}]", regex.V1)


def clean_text(text: str) -> str:
    """Text that UTF-8 can carry: both halves of a character are joined, and one alone becomes U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def plain(text: str) -> str:
    """Text in NFKC, with ASCII's quotes and dashes and without what is invisible, such as soft hyphens."""
    return text if text.isascii() else unicodedata.normalize("NFKC", _INVISIBLE.sub("", text.translate(_ALIKE)))


def words(text: str, joined: bool = False, pairs: bool = False) -> list[str]:
    """What is compared of a text, in any script: its words in one case, or characters where no spaces part the words.

    `joined` makes one word of "U.S." and of "don't"; `pairs` adds each two characters that follow one another.
    """
    text = plain(text).casefold()
    found = (_ASCII_WORD if text.isascii() else _WORD).findall(_PUNCTUATION.sub("", text) if joined else text)
    return found + _PAIR.findall(text, overlapped=True) if pairs and not text.isascii() else found


def spaced(text: str) -> str:
    """Plain text with spaces around what tokenizers of English leave together; that of ASCII is as it was."""
    return text if text.isascii() else _APART.sub(r" \g<0> ", plain(text))


def without_thoughts(reply: str) -> str:
    """What a reply says behind the last end of thoughts, which a prompt may have begun; "" where others begin there."""
    said = _THOUGHTS_END.split(reply)[-1].strip()
    return "" if _THOUGHTS_BEGIN.search(said) else said


def added(text: str, shown: str) -> str:
    """What a growing reply says beyond what was shown of it: all, where that was thoughts, whose end came at last.

    Decoders that mend spaces may change the last letters: these stay as they were shown.
    """
    return text[len(shown) :] if text.startswith(shown[: len(shown) // 2]) else text


def as_text(tokenizer: Any) -> Callable[[str], str]:
    """What keeps text from outside text: a space breaks control tokens of this tokenizer, or replaces a character.

    Control tokens are the special ones, and added ones between signs, such as `<think>`; added words stay whole.
    """
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    forms = [str, normalizer.normalize_str] if normalizer else [str]  # some are found in lower case, or after NFKC
    added = ((token, each.content.strip(), each.special) for token, each in tokenizer.added_tokens_decoder.items())
    control = {token: name for token, name, special in added if name and (special or _BETWEEN_SIGNS(name))}
    names = {form(name) for name in control.values() for form in forms} - {"", *string.punctuation}  # "!" may pad
    begins = re.compile("|".join(sorted({re.escape(name[:3]) for name in names})), re.IGNORECASE).search
    keeps_ascii = forms[-1](_SIGNS).lower().endswith(_SIGNS.lower())

    def mended(text: str) -> str:
        if keeps_ascii and _ASCII(text) and not begins(text):
            return text  # normalizing costs a fifth of tokenizing
        for form in forms:
            seen = broken = form(text)
            if begins(seen) and not control.keys().isdisjoint(tokenizer.encode(text, add_special_tokens=False)):
                for name in sorted(names, key=len):
                    broken = broken.replace(name, f"{name[:-1]} {name[1:][-1:]}")
                text = text if broken == seen else broken
        return text

    return mended if control else str


def parse_json(text: str | bytes, kind: type = dict) -> Any:
    """The value of this kind in JSON from outside; a ValueError says what is wrong with it.

    Its numbers are finite (NaN, which JSON has not, counts as null), its text is clean, and it is not nested too deeply
    to be walked through.
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
    """The number of this kind in a text; a ValueError for NaN, infinities and what no float holds."""
    if not math.isfinite(float(text)):
        raise ValueError(f"{text[:20]} is no finite number")
    return kind(text)


_STRICT = json.JSONDecoder(parse_float=partial(finite, float), parse_int=partial(finite, int), parse_constant={}.get)
