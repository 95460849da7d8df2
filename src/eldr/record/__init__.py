"""Records traces: sends prompts to a model and keeps the experts that served them.

Where the experts come from is a source, one file each: eldr's connector in vLLM, vLLM's or SGLang's own record of
routed experts, or a Hugging Face model in this process. All give the same trace.
"""

from eldr.record.connector import Connector
from eldr.record.prompts import Prompt, RecordError, prompt_text, read_prompts
from eldr.record.recording import Recording, record
from eldr.record.routed_experts import RoutedExperts
from eldr.record.server import RecordOptions, only_model
from eldr.record.sglang import Sglang
from eldr.record.sources import MoeShape, Sample, Source

__all__ = [
    "Connector",
    "MoeShape",
    "Prompt",
    "RecordError",
    "RecordOptions",
    "Recording",
    "RoutedExperts",
    "Sample",
    "Sglang",
    "Source",
    "only_model",
    "prompt_text",
    "read_prompts",
    "record",
]
