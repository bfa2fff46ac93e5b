"""Reading and writing checkpoints in the layout of `sentence-transformers`, except the backbone."""

import json
import logging
import pydoc
import re
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import cached_file

from rqa.runtime.errors import UserError, one_line
from rqa.runtime.files import read_json

log = logging.getLogger(__name__)

SETTINGS_FILE = "rqa_encoder.json"
GENERAL_FILE = "config_sentence_transformers.json"
PASSAGE_ENCODER = "passage_encoder"  # the folder of a separate passage encoder
TYPES = "sentence_transformers.models."
POOLING = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "lasttoken", "max_tokens": "max",
           "weightedmean_tokens": "weightedmean"}  # keys follow `pooling_mode_` in the file  # fmt: skip
# The layers that may follow Pooling, with default settings; the first setting is the input width.
LAYERS: dict[str, dict[str, Any]] = {
    "Dense": {"in_features": 0, "out_features": 0, "bias": True,
              "activation_function": "torch.nn.modules.activation.Tanh"},
    "LayerNorm": {"dimension": 0}, "Normalize": {},
}  # fmt: skip
# The only values supported for these module settings; others would change embeddings.
PLAIN = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding", "use_residual": False}
PLAIN_READING = {"transformer_task": "feature-extraction", "module_output_name": "token_embeddings",
                 "query_expansion": {}, "processing_kwargs": {}}  # fmt: skip
KINDS = {str: "a string", bool: "true or false", int: "a whole number (a length: at least 3)", dict: "an object",
         list: "a list"}  # fmt: skip
LENGTHS = ("max_query_length", "max_passage_length")


@dataclass(frozen=True)
class EncoderSettings:
    """Settings that determine embeddings, besides weights and the layers after pooling."""

    pooling_type: str = "mean"
    normalize: bool = True
    query_prefix: str = ""
    passage_prefix: str = ""
    max_query_length: int = 512
    max_passage_length: int = 512
    include_prompt: bool = True  # whether pooling includes the prefix's tokens
    truncate_dim: int = 0  # leading dimensions to keep; 0: all


class Normalize(nn.Module):
    """Normalises vectors to length 1. [B, D] -> [B, D]"""

    def forward(self, vectors: Tensor) -> Tensor:
        return nn.functional.normalize(vectors, dim=-1)


class Layer(nn.Sequential):
    """A layer after pooling; parts are named as in its weights file, settings as in its config.json."""

    def __init__(self, kind: str, **config: Any) -> None:
        super().__init__()
        self.kind, self.config = kind, LAYERS[kind] | config
        if kind == "Dense":
            name = self.config["activation_function"]
            activation: Any = pydoc.locate(name) if name.startswith("torch.nn.") else None
            if not (isinstance(activation, type) and issubclass(activation, nn.Module)):
                raise ValueError(f"activation_function {name} is not supported; only modules of torch.nn")
            self.linear = nn.Linear(self.config["in_features"], self.config["out_features"], self.config["bias"])
            self.activation_function = activation()
        else:
            self.norm = nn.LayerNorm(self.config["dimension"]) if kind == "LayerNorm" else Normalize()


def chain(layers: Iterable[Layer]) -> nn.Sequential:
    """Layers after pooling, named like their folders. [B, H] -> [B, D]"""
    return nn.Sequential(OrderedDict((f"{number}_{layer.kind}", layer) for number, layer in enumerate(layers, 2)))


def width_behind(layers: Iterable[nn.Module], width: int) -> int:
    """The output width D of layers with input width H."""
    linear = [part for layer in layers for part in layer.modules() if isinstance(part, nn.Linear)]
    return linear[-1].out_features if linear else width


def configs(layers: nn.Sequential) -> dict[str, Any]:
    """The settings of each layer by folder name."""
    return {name: layer.config for name, layer in layers.named_children()}


def write_layout(directory: Path, encoder: Any) -> None:
    """Write everything but the backbones, for `sentence-transformers` and `read_layout` to load the same encoder."""
    settings, layers, two_encoders = encoder.settings, encoder.projection, encoder.passage_encoder is not None
    files: dict[str, Any] = {f"{name}/config.json": config for name, config in configs(layers).items()}
    modules = {"": "Transformer", "1_Pooling": "Pooling"} | {name: name.split("_")[1] for name in configs(layers)}
    modules = {path: TYPES + name for path, name in modules.items()}
    unit = f"{len(modules)}_Normalize"
    if two_encoders:
        queries = {path or ".": name for path, name in modules.items()}
        passages = {f"{PASSAGE_ENCODER}/{path}".rstrip("/"): name for path, name in modules.items()}
        routes, options = {"query": list(queries), "document": list(passages)}, {"default_route": "query"}
        files["router_config.json"] = {"types": queries | passages, "structure": routes, "parameters": options}
        modules = {"": f"{TYPES}Router"}
    if settings.normalize:
        modules[unit], files[f"{unit}/config.json"] = f"{TYPES}Normalize", {}
    width, pooling = encoder.backbone.config.hidden_size, {"include_prompt": settings.include_prompt}
    pooling |= {f"pooling_mode_{key}": settings.pooling_type == name for key, name in POOLING.items()}
    prompts = {"query": settings.query_prefix, "document": settings.passage_prefix}
    similarity = {"default_prompt_name": None, "similarity_fn_name": "cosine" if settings.normalize else "dot"}
    files |= {
        "sentence_bert_config.json": {"max_seq_length": settings.max_passage_length, "do_lower_case": False},
        GENERAL_FILE: {"prompts": prompts, **similarity, "truncate_dim": settings.truncate_dim or None},
        "1_Pooling/config.json": pooling | {"word_embedding_dimension": width},
        SETTINGS_FILE: asdict(settings) | {"two_encoders": two_encoders, "layers": list(configs(layers))},
    }  # fmt: skip
    write_parts(directory, modules, files)
    for name, layer in layers.named_children():
        if weights := layer.state_dict():
            save_file(weights, directory / name / "model.safetensors")


def read_layout(path: str, limit: int, flags: Any) -> dict[str, Any]:
    """The settings in a checkpoint's files, the folders of its layers, and whether it has two encoders.

    Settings have the meaning of sentence-transformers' `encode_query`, `encode_document` and `similarity`; unsupported
    ones raise unless a flag overrides them. Defaults are cosine similarity, with or without a Normalize module, and
    texts cut to `limit` tokens.
    """
    if ours := read_part(path, SETTINGS_FILE):  # takes precedence over leftover folders
        defaults = vars(EncoderSettings()) | {"two_encoders": False, "layers": [], "projection": 0}
        found = {name: stated(f"{path}/{SETTINGS_FILE}", ours, name, value) for name, value in defaults.items()}
        # Older checkpoints state only that there is a projection, which was these two layers.
        names = ["2_Dense", "3_LayerNorm"] if found.pop("projection") else map(str, found["layers"])
        return found | {"layers": [(name, name.partition("_")[2]) for name in names]}
    if not (modules := read_modules(path)):
        return dict.fromkeys(LENGTHS, min(limit, 512)) | {"layers": []}
    folders, names = zip(*modules, strict=True)
    flat = all(re.fullmatch(r"\w[\w.-]*", folder) for folder in folders[1:])
    if names[:2] != ("Transformer", "Pooling") or {*names[2:]} - {*LAYERS} or folders[0] or not flat:
        wanted = f"Transformer with path '', Pooling, then any of {', '.join(LAYERS)}, each in a folder beside it"
        raise UserError(f"{path}/modules.json: modules {', '.join(names)} are not supported; only {wanted}")
    file, pooling_file = f"{path}/{GENERAL_FILE}", f"{folders[1]}/config.json"
    general = partial(stated, file, read_part(path, GENERAL_FILE))
    prompts, similarity = general("prompts", {}), general("similarity_fn_name", "cosine")
    if similarity not in ("cosine", "dot") and flags.normalize is None:
        raise UserError(f"{file}: similarity_fn_name {similarity} is not supported; choose --normalize true (cosine)")
    cut, unit = flags.truncate_dim or general("truncate_dim", 0), names[-1] == "Normalize"
    layers = modules[2:]
    if unit and (similarity == "cosine" or flags.normalize is not None or not cut):
        layers.pop()  # `normalize` does the same
    # Truncated unit vectors have other lengths, which change dot products but not cosine.
    normalize = similarity != "dot" or (unit and not cut)
    prompt = {name: stated(file, prompts, name, "") for name in ("query", "document", "passage", "corpus")}
    passages = prompt["document"] if "document" in prompts else prompt["passage"] or prompt["corpus"]
    if passages and "document" not in prompts and flags.passage_prefix is None:
        other = "sentence-transformers 5 and later do not use; remove it with --passage_prefix ''"
        log.warning("%s: passages begin with the prompt %r, which %s", file, passages, other)
    if not (pooling := read_part(path, pooling_file)):
        raise UserError(f"{path}/{pooling_file}: is missing or empty; copy it from the original model")
    pools = partial(stated, f"{path}/{pooling_file}", pooling)
    old = [key.split("_", 2)[2] for key in pooling if key.startswith("pooling_mode_") and pools(key, False)]
    modes = pooling.get("pooling_mode") or [POOLING.get(name, name) for name in old]
    kinds = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")  # the first is current
    found = next(filter(None, (read_part(path, f"sentence_{kind}_config.json") for kind in kinds)), {})
    reading = partial(stated, file := f"{path}/sentence_bert_config.json", found)
    refuse_others(file, found, PLAIN_READING)
    if "message" in reading("modality_config", {}):  # it would also apply to plain texts
        raise UserError(f"{file}: modality_config message (a chat template) is not supported; only text")
    length = reading("max_seq_length", limit)
    return {
        "pooling_type": "+".join(map(str, modes if isinstance(modes, list) else [modes])) or "mean",
        "pooling_file": pooling_file, "include_prompt": pools("include_prompt", True),
        "normalize": normalize, "truncate_dim": cut, "layers": layers,
        "query_prefix": prompt["query"], "passage_prefix": passages,
        "max_query_length": reading("query_length", length), "max_passage_length": reading("document_length", length),
        "do_lower_case": reading("do_lower_case", False),
    }  # fmt: skip


def read_layers(path: str, folder: str, folders: Iterable[tuple[str, str]], width: int) -> nn.Sequential:
    """The layers after pooling, in float32, from pairs of folder name and kind. [B, H] -> [B, D]"""
    layers: list[Layer] = []
    for name, kind in folders:
        file = f"{path}/{(place := str(Path(folder, name)))}/config.json"
        settings = read_part(path, f"{place}/config.json")
        refuse_others(file, settings, PLAIN)
        config = {key: stated(file, settings, key, default) for key, default in LAYERS.get(kind, {}).items()}
        first = next(iter(config), "")
        if first and config[first] != (before := width_behind(layers, width)):
            raise UserError(f"{file}: {first} {config[first]}: must be {before}; copy the original files")
        try:
            with torch.device("meta"):  # a wrong setting must not allocate memory
                layers.append(Layer(kind, **config).float())
            if config:
                weights = load_file(cached_file(path, f"{place}/model.safetensors"))
                layers[-1].load_state_dict({name: value.float() for name, value in weights.items()}, assign=True)
        except (OSError, RuntimeError, TypeError, KeyError, ValueError, SafetensorError) as error:
            raise UserError(f"{file}: the layer cannot be loaded: {one_line(error)}") from None
    return chain(layers)


def refuse_others(file: str, settings: dict[str, Any], plain: dict[str, Any]) -> None:
    """Raise if settings have other values than `plain`."""
    for name, value in plain.items():
        if (found := stated(file, settings, name, value)) != value:
            raise UserError(f"{file}: {name} {found} is not supported; only {value or 'none'}")


def stated(file: str, settings: Any, name: str, default: Any) -> Any:
    """The value of a setting in a file, or the default; raises unless it has the default's type."""
    value = settings.get(name) if isinstance(settings, dict) else settings
    if value is None:
        return default
    if type(value) is not type(default) or (type(value) is int and value < (3 if "length" in name else 0)):
        raise UserError(f"{file}: {name} must be {KINDS[type(default)]}, found {value!r:.50}")
    return value


def write_parts(directory: Path, modules: dict[str, str], files: dict[str, Any]) -> None:
    """Write a checkpoint's `modules.json`, from module types by folder, and other JSON files by path."""
    numbered = enumerate(modules.items())
    listed = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in numbered]
    for name, value in ({"modules.json": listed} | files).items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_modules(path: str) -> list[tuple[str, str]]:
    """Folder and kind of each module of a checkpoint; empty if it is not from `sentence-transformers`."""
    file, modules = f"{path}/modules.json", read_part(path, "modules.json", list)
    entries = [(stated(file, module, "path", ""), stated(file, module, "type", "")) for module in modules]
    return [(folder, re.sub(r"^sentence_transformers\.(.*\.)?", "", kind)) for folder, kind in entries]


def read_part(path: str, name: str, kind: type = dict) -> Any:
    """A JSON file in a directory or hub repository; empty if there is none."""
    try:
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False)  # private; else it raises OSError
        return read_json(file, kind) if file else kind()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}/{name}: cannot be read ({error})") from None
