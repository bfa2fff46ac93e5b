"""rqa: train retrievers and readers on your own documents."""

__version__ = "0.1.0"
