"""Every layout by its name."""

from rqa.data.convert import answers, contexts
from rqa.data.convert.judged import JUDGED
from rqa.data.convert.rows import RowFormat, one_row_each

__all__ = ["FORMATS", "JUDGED"]

FORMATS = {
    "dpr": RowFormat(contexts.read_dpr, one_row_each(contexts.write_dpr), around=("[", "]")),
    "fid": RowFormat(contexts.read_fid, one_row_each(contexts.write_fid), around=("[", "]")),
    "squad": RowFormat(
        answers.read_squad, answers.write_squad, key="data", around=('{"version": "v2.0", "data": [', "]}")
    ),
    "msmarco": RowFormat(contexts.read_msmarco, one_row_each(contexts.write_msmarco)),
    "nq_open": RowFormat(answers.read_nq_open, one_row_each(answers.write_nq_open)),
    "triviaqa": RowFormat(
        answers.read_triviaqa, one_row_each(answers.write_triviaqa), key="Data", around=('{"Data": [', "]}")
    ),
    "tevatron": RowFormat(
        contexts.read_tevatron, one_row_each(contexts.write_tevatron), contexts.write_tevatron_passage, answers=False
    ),
    "flagembedding": RowFormat(contexts.read_flagembedding, one_row_each(contexts.write_flagembedding), answers=False),
    "flashrag": RowFormat(
        contexts.read_flashrag, one_row_each(contexts.write_flashrag), contexts.write_flashrag_passage
    ),
}
