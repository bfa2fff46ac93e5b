"""An encoder's files beside its weights, in the layout of `sentence-transformers`."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from rqa.models.projection import DENSE, LAYER_NORM
from rqa.runtime.errors import UserError

POOLING_KEYS = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}
SETTINGS_FILE = "rqa_encoder.json"
PASSAGE_ENCODER = "passage_encoder"
ENCODER_MODULES = {"Transformer": "", "Pooling": "1_Pooling"}
PROJECTION_MODULES = {"Dense": DENSE, "LayerNorm": LAYER_NORM}
NORMALIZE = "2_Normalize"


@dataclass(frozen=True)
class EncoderSettings:
    """What, beside the weights, decides an embedding."""

    pooling_type: str = "mean"
    normalize: bool = True
    query_prefix: str = ""
    passage_prefix: str = ""
    max_query_length: int = 512
    max_passage_length: int = 512
    projection: int = 0  # the projection's width; 0: there is none


def write_layout(directory: Path, settings: EncoderSettings, dimension: int, two_encoders: bool = False) -> None:
    """Write all but backbone and tokenizer.

    Args:
        dimension: The pooled embedding's width, before any projection.
        two_encoders: Whether passages have an encoder of their own, in the folder `PASSAGE_ENCODER`.
            `sentence-transformers` then routes `encode_query` and `encode_document` to one each.
    """
    encoder = ENCODER_MODULES | (PROJECTION_MODULES if settings.projection else {})
    paths = ({"Router": ""} if two_encoders else encoder) | ({"Normalize": NORMALIZE} if settings.normalize else {})
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for index, (kind, path) in enumerate(paths.items())
        ],
        "sentence_bert_config.json": {"max_seq_length": settings.max_passage_length, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": {"query": settings.query_prefix, "document": settings.passage_prefix},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine" if settings.normalize else "dot",
        },
        "1_Pooling/config.json": {
            "word_embedding_dimension": dimension,
            **{key: settings.pooling_type == name for name, key in POOLING_KEYS.items()},
        },
        SETTINGS_FILE: asdict(settings) | {"two_encoders": two_encoders},
    }
    if two_encoders:
        files["router_config.json"] = _router(encoder)
    for name, value in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    (directory / NORMALIZE).mkdir(exist_ok=True)


def _router(modules: dict[str, str]) -> dict[str, Any]:
    routes = {
        route: {f"{folder}{path}".rstrip("/") or ".": kind for kind, path in modules.items()}
        for route, folder in (("query", ""), ("document", f"{PASSAGE_ENCODER}/"))
    }
    types = {path: f"sentence_transformers.models.{kind}" for route in routes.values() for path, kind in route.items()}
    structure = {route: list(paths) for route, paths in routes.items()}
    return {"types": types, "structure": structure, "parameters": {"default_route": "query"}}


def has_two_encoders(path: str) -> bool:
    """Whether the checkpoint holds a passage encoder of its own. Its settings decide, not a folder left behind."""
    return bool(_read_json(path, SETTINGS_FILE).get("two_encoders"))


def stored_settings(path: str) -> Iterator[tuple[str, Any]]:
    """The settings that a checkpoint's own files state.

    Raises:
        UserError: they name a module or a way of pooling that is not offered.
    """
    known = {field.name for field in fields(EncoderSettings)}
    if ours := _read_json(path, SETTINGS_FILE):
        yield from ((name, value) for name, value in ours.items() if name in known)
        return
    listed = _read_json(path, "modules.json")
    if not listed:
        return
    modules = {module["type"].rpartition(".")[2]: module["path"] for module in listed}
    if unknown := set(modules) - {"Transformer", "Pooling", "Normalize"}:
        raise UserError(f"{path}/modules.json: module {sorted(unknown)[0]} is not supported")
    yield "normalize", "Normalize" in modules
    if "Pooling" in modules:
        yield "pooling_type", _stored_pooling(path, f"{modules['Pooling']}/config.json")
    config = _read_json(path, "sentence_bert_config.json")
    if config.get("max_seq_length"):
        yield "max_query_length", config["max_seq_length"]
        yield "max_passage_length", config["max_seq_length"]
    prompts = _read_json(path, "config_sentence_transformers.json").get("prompts") or {}
    yield "query_prefix", prompts.get("query") or ""
    yield "passage_prefix", prompts.get("document") or prompts.get("passage") or ""


def _stored_pooling(path: str, name: str) -> str:
    config = _read_json(path, name)
    modes = [key.removeprefix("pooling_mode_") for key, value in config.items()
             if key.startswith("pooling_mode_") and value is True]  # fmt: skip
    if isinstance(config.get("pooling_mode"), str):
        modes = [config["pooling_mode"]]
    names = {"mean_tokens": "mean", "cls_token": "cls", "mean": "mean", "cls": "cls"}
    if len(modes) != 1 or modes[0] not in names:
        raise UserError(
            f"{path}/{name}: pooling {'+'.join(modes) or 'none'} is not supported; choose --pooling_type mean or cls"
        )
    return names[modes[0]]


def _read_json(path: str, name: str) -> Any:
    """A JSON file of a directory or of a hub repository; empty if there is none."""
    try:
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        return json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}/{name}: cannot be read ({error})") from None
