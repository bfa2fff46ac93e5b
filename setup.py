"""Packaging: ranges here, the tested versions in requirements.txt."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

REQUIRED = [
    "torch>=2.11",  # arithmetic, optimizer, processes; older ones have no varlen_attn with a scale and windows
    "numpy>=2.0",  # embeddings between torch and FAISS
    "safetensors>=0.5",  # checkpoints that cannot execute code
    "tokenizers>=0.21",  # fast tokenizers behind transformers
    "transformers>=5.17,<6",  # architectures, chat templates; older ones call mask functions with other arguments
    "accelerate>=1.10",  # transformers needs it to build a model without reading its weights
    "faiss-cpu>=1.9",  # nearest-neighbour search
    "tqdm>=4.66",  # progress with time left
    "sacrebleu>=2.4",  # BLEU as published
    "regex>=2024.5",  # Unicode properties: words of any script, and where a text without spaces may be cut
    "rouge-score>=0.1.2",  # ROUGE as published
    "openai>=1.50",  # readers and judges behind an OpenAI-compatible server
    "Jinja2>=3.1",  # chat templates; transformers renders them with it but does not require it
    "matplotlib>=3.9",  # the curves of report.html
]

EXTRAS = {
    "quickstart": [
        "gguf>=0.17",  # the quickstart's language model comes as GGUF
        "starlette>=0.40",  # what the extra `serve` brings, for --serve
        "uvicorn>=0.30",
    ],
    "milvus": [
        "pymilvus>=2.6",  # an index on a Milvus server; with milvus-lite in a directory, too
    ],
    "documents": [
        "trafilatura>=2",  # the text of a web page without its menus, headings kept
        "lxml_html_clean>=0.4",  # trafilatura needs it by an extra of lxml that an older pip does not find
        "pypdf>=5",  # the text of a PDF; pure Python under a BSD licence, where PyMuPDF is AGPL
    ],
    "serve": [
        "starlette>=0.40",  # the routes of bin/serve
        "uvicorn>=0.30",  # its sockets
    ],
    "test": [
        "starlette>=0.40",  # what the extra `serve` brings; the OpenAI-compatible server of the tests, too
        "uvicorn>=0.30",
        "selenium>=4.20",  # the page in a browser, where chromium and chromedriver are installed
        "pytest>=8",  # the test suite
        "pytest-xdist>=3.7",  # runs it on two cores
        "setuptools>=70.1",  # builds the wheel of a test by itself; older ones need the package `wheel`
        "ruff>=0.14",  # the linter of .ci/run
        "sentence-transformers>=5",  # the oracle for the encoder's layout on disk
        "peft>=0.17",  # the oracle for adapters
        "torchao>=0.18",  # what the extra `8bit` brings
        "hypothesis>=6.100",  # malformed input that nobody thought of; properties of chunking and formats
        "langchain-text-splitters>=1",  # the oracle of chunking
        "trafilatura>=2",  # what the extra `documents` brings
        "lxml_html_clean>=0.4",
        "pypdf>=5",
        "pymilvus>=2.6",  # what the extra `milvus` brings
        "milvus-lite>=3.2",  # the server behind it
        "pytrec_eval-terrier>=0.5.6",  # the oracle for the metrics of rankings
    ],
    "bench": [
        "sentence-transformers>=5",  # the peer of encoding and of retriever training
        "trl>=0.24",  # the peer of reader training
        "datasets>=4",  # what trl reads
        "langchain-text-splitters>=1",  # a peer of chunking
        "semchunk>=3",  # another
    ],
    "8bit": ["torchao>=0.18"],  # --optim adamw_8bit; it compiles its step with a C++ compiler
    "flash": ["flash-attn>=2.7"],  # variable-length attention kernels on CUDA
    "lora": ["peft>=0.17"],  # low-rank adapters
    "tracking": ["tensorboard>=2.18", "wandb>=0.19", "trackio>=0.5"],  # --report_to
}

setup(
    name="rqa",
    version="0.1.0",
    description="Train retrieval-augmented question answering systems on your own documents",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",  # as transformers 5.23
    packages=find_namespace_packages(include=["rqa", "rqa.*"]),
    package_data={"rqa.evaluation": ["report.html"], "rqa.serving": ["page.html"]},
    scripts=sorted(str(path) for path in Path("bin").iterdir() if path.is_file()),
    install_requires=REQUIRED,
    extras_require=EXTRAS,
)
