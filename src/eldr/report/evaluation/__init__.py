"""The report of an evaluation: one HTML page, pictures, and a README with every number."""

from eldr.report.evaluation.document import evaluation_blocks, evaluation_sections, write_evaluation

__all__ = ["evaluation_blocks", "evaluation_sections", "write_evaluation"]
