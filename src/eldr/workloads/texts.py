"""Built-in prompts, for when no real ones are at hand: templates written for this project and filled in at random.

They have the lengths of a workload and the vocabulary of its kinds, but little else in common with real questions. Use
your own prompts (--prompts) for any result that you report.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from eldr.workloads.kinds import KINDS, Kind

# Rough characters per token of common tokenizers. The lengths of built-in prompts are no more exact than that.
CHARS_PER_TOKEN: Mapping[str, float] = {
    "code": 3.2, "math": 2.5, "chinese": 1.5, "japanese": 1.6, "russian": 3.2,
}  # fmt: skip
DEFAULT_CHARS_PER_TOKEN = 4.2

_ENGLISH = Kind(
    openings=("Tell me, in a few paragraphs: ", "I have been wondering about something. ", "Help me with this. "),
    sentences=(
        "Last $time my $who asked me about the $thing by the $place.",
        "What would you say to a $who who wants to $verb a $thing?",
        "In $place the $thing is said to be older than the town itself.",
        "Could you compare a $thing with a $thing2 and tell me which to $verb first?",
        "Write a short story in which a $who has to $verb the $thing before $time.",
        "My plan for $time is to $verb the $thing2, but the $who disagrees.",
    ),
    slots={
        "time": ("winter", "Sunday", "summer", "evening", "spring", "harvest"),
        "who": ("neighbour", "teacher", "baker", "sailor", "cousin", "gardener"),
        "thing": ("bridge", "recipe", "garden", "clock", "letter", "boat"),
        "thing2": ("map", "kettle", "violin", "ladder", "lamp", "bicycle"),
        "place": ("the harbour", "the valley", "the old market", "the north", "the island", "the river"),
        "verb": ("repair", "sell", "paint", "describe", "carry", "understand"),
    },
)
_FRENCH = Kind(
    openings=("Explique-moi, en quelques paragraphes : ", "J'ai une question qui m'occupe depuis longtemps. "),
    sentences=(
        "$time, $who m'a parlé de $thing près de $place.",
        "Que dirais-tu à $who qui voudrait $verb $thing ?",
        "On raconte que $thing, à $place, est plus ancien que la ville.",
        "Écris une petite histoire où $who doit $verb $thing avant la nuit.",
        "Pourquoi faudrait-il $verb $thing $time ?",
    ),
    slots={
        "time": ("hier soir", "cet hiver", "dimanche", "au printemps", "ce matin"),
        "who": ("mon voisin", "une boulangère", "le vieux marin", "ma cousine", "un jardinier"),
        "thing": ("le pont", "la recette", "le jardin", "l'horloge", "la lettre"),
        "place": ("la rivière", "le port", "la vallée", "le marché", "l'île"),
        "verb": ("réparer", "vendre", "peindre", "décrire", "comprendre"),
    },
)
_SPANISH = Kind(
    openings=("Explícame con calma lo siguiente: ", "Hace tiempo que le doy vueltas a una pregunta. "),
    sentences=(
        "$time $who me habló de $thing cerca de $place.",
        "¿Qué le dirías a $who si quisiera $verb $thing?",
        "Cuentan que $thing, junto a $place, es más antiguo que el pueblo.",
        "Escribe un cuento breve en el que $who tenga que $verb $thing antes de la noche.",
        "¿Por qué convendría $verb $thing $time?",
    ),
    slots={
        "time": ("ayer", "este invierno", "el domingo", "en primavera", "esta mañana"),
        "who": ("mi vecino", "una panadera", "el viejo marinero", "mi prima", "un jardinero"),
        "thing": ("el puente", "la receta", "el jardín", "el reloj", "la carta"),
        "place": ("el río", "el puerto", "el valle", "el mercado", "la isla"),
        "verb": ("reparar", "vender", "pintar", "describir", "entender"),
    },
)
_GERMAN = Kind(
    openings=("Erkläre mir bitte ausführlich: ", "Seit einiger Zeit beschäftigt mich eine Frage. "),
    sentences=(
        "$time erzählte mir $who von $thing in der Nähe $place.",
        "Was würdest du sagen, wenn $who $thing $verb wollte?",
        "Es heißt, dass es $thing schon länger gibt als die Stadt.",
        "Schreibe eine kurze Geschichte, in der $who $thing vor der Nacht $verb muss.",
        "Warum sollte man $thing gerade $time $verb?",
    ),
    slots={
        "time": ("gestern", "im Winter", "am Sonntag", "im Frühling", "heute früh"),
        "who": ("mein Nachbar", "eine Bäckerin", "der alte Seemann", "meine Kusine", "ein Gärtner"),
        "thing": ("die Brücke", "das Rezept", "den Garten", "die Uhr", "den Brief"),
        "place": ("des Flusses", "des Hafens", "des Tals", "des Marktes", "der Insel"),
        "verb": ("reparieren", "verkaufen", "malen", "beschreiben", "verstehen"),
    },
)
TEXTS: Mapping[str, Kind] = {
    "code": KINDS["code"],
    "math": KINDS["mathematics"],
    "medical": KINDS["medicine"],
    "legal": KINDS["law"],
    "english": _ENGLISH,
    "chinese": KINDS["chinese"],
    "russian": KINDS["russian"],
    "japanese": KINDS["japanese"],
    "french": _FRENCH,
    "spanish": _SPANISH,
    "german": _GERMAN,
}


def write_prompt(kind: str, tokens: int, rng: random.Random) -> str:
    """Write a text of a workload's kind, about `tokens` tokens long."""
    texts = TEXTS[kind]
    chars = round(tokens * CHARS_PER_TOKEN.get(kind, DEFAULT_CHARS_PER_TOKEN))
    text = rng.choice(texts.openings)
    while len(text) < chars:
        text += texts.sentence(rng.choice(texts.sentences), rng)
    return text[: max(chars, 1)]
