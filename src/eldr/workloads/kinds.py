"""Kinds of text: openings and sentence templates, written for this project and filled in by a seeded generator.

Prompts of one kind share their openings, so that they hit prefix caches, and differ in the slots that are filled in.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from string import Template


@dataclass(frozen=True, slots=True)
class Kind:
    """How prompts of one kind are made.

    openings: texts that many prompts start with.
    sentences: templates, a few of which follow.
    slots: name -> texts that may replace `$name`. `$n` and `$m` are numbers everywhere.
    joint: the text between the parts.
    """

    openings: tuple[str, ...]
    sentences: tuple[str, ...]
    slots: Mapping[str, tuple[str, ...]]
    joint: str = " "

    def sentence(self, template: str, rng: random.Random) -> str:
        """Fill the slots of a template at random."""
        fills = {name: rng.choice(texts) for name, texts in self.slots.items()}
        fills |= {name: str(rng.randint(2, 99)) for name in ("n", "m")}
        return Template(template).substitute(fills) + self.joint


KINDS: Mapping[str, Kind] = {
    "code": Kind(
        openings=(
            "# Complete this Python module; keep its style.\nfrom __future__ import annotations\nimport json\n\n",
            "# Review this patch: types, errors, edge cases.\nimport os, sys\nfrom pathlib import Path\n\n",
        ),
        sentences=(
            "def ${verb}_${noun}(self, ${noun}_id: int = $n) -> dict[str, Any]:\n"
            "    return self._$store[${noun}_id]['$field']\n",
            "for i, $noun in enumerate(self.${noun}s[$n:$m]):\n    if $noun.$field != $store[i]:\n        break\n",
            "try:\n    $store = json.loads(path.read_text())['${noun}s'][$n]\nexcept KeyError:\n    raise\n",
            "assert ${verb}_${noun}($store, $field=$n) == {'$field': $m}, f\"{$store!r}\"\n",
            "class $Noun(Base):\n    __slots__ = ('$field', '_$store')\n    LIMIT = $n * $m\n",
            "self._$store.update({'$field': $n, '${noun}_id': [$m]})  # TODO: ${verb}()\n",
        ),
        slots={
            "verb": ("load", "merge", "parse", "drop", "index", "send", "retry", "sort"),
            "noun": ("user", "order", "token", "block", "route", "page", "job", "node"),
            "Noun": ("User", "Order", "Token", "Block", "Route", "Page", "Job", "Node"),
            "field": ("name", "size", "state", "owner", "total", "key", "path", "flags"),
            "store": ("cache", "table", "rows", "queue", "config", "index"),
        },
        joint="\n",
    ),
    "mathematics": Kind(
        openings=(
            "1) 2x + 3 = 11; 2x = 8; x = 4. 2) 3x - 5 = 10; 3x = 15; x = 5. 3) 7x + 1 = 22; 7x = 21; x = 3. 4) ",
            "12 + 7 = 19; 19 * 2 = 38; 38 - 5 = 33; 33 / 3 = 11; 11^2 = 121; 121 + 4 = 125; 125 / 5 = 25; ",
        ),
        sentences=(
            "${n}x + $m = $k; ${n}x = $k - $m;",
            "x^2 - ${n}x + $m = 0; D = $n^2 - 4*$m;",
            "($n + $m) * $k = $n*$k + $m*$k;",
            "f(x) = ${n}x^3 - ${m}x^2 + $k; f'(x) = 3*${n}x^2 - 2*${m}x; f($k) = ?",
            "$n/$m + $k/$m = ($n + $k)/$m;",
            "2^$d * 3^$d - $n = 6^$d - $n; 10^$d / $m =",
            "[$n, $m; $k, $d] * [1, 0; 0, 1] = [$n, $m; $k, $d]; det = $n*$d - $m*$k;",
        ),
        slots={"d": tuple("2345678"), "k": tuple(str(k) for k in range(11, 98, 3))},
    ),
    "medicine": Kind(
        openings=(
            "You are assisting a physician. Read the case and name the most likely diagnosis and the next step. ",
            "Summarise the following clinical note for the patient, in plain words and without abbreviations. ",
        ),
        sentences=(
            "The patient reports $symptom and $symptom2 for several $time, worse after $trigger.",
            "On examination the $organ is $finding and there is no sign of $disease.",
            "A history of $disease was treated with $drug, which was stopped because of $symptom.",
            "Blood tests show $finding $organ function; the family has a history of $disease.",
            "Treatment with $drug was started and the $symptom improved within a few $time.",
            "Which investigation would confirm $disease, and how does $drug act on the $organ?",
        ),
        slots={
            "symptom": ("fever", "chest pain", "fatigue", "shortness of breath", "nausea", "a dry cough"),
            "symptom2": ("dizziness", "night sweats", "weight loss", "back pain", "headache", "palpitations"),
            "trigger": ("meals", "exercise", "lying down", "a long journey", "climbing stairs", "cold air"),
            "organ": ("liver", "thyroid", "kidney", "heart", "spleen", "stomach"),
            "finding": ("enlarged", "tender", "reduced", "normal", "irregular", "markedly altered"),
            "disease": ("pneumonia", "diabetes", "anaemia", "hypertension", "hepatitis", "asthma"),
            "drug": ("metformin", "amoxicillin", "ibuprofen", "prednisolone", "furosemide", "a beta blocker"),
            "time": ("days", "weeks", "hours", "months"),
        },
    ),
    "law": Kind(
        openings=(
            "You are advising a tenant. State which rule of the contract applies here, and what follows from it. ",
            "Explain the following clause to somebody who has never read a contract, and name its risks. ",
        ),
        sentences=(
            "The $party shall notify the $other in writing before the $thing is $act, unless a court $rules otherwise.",
            "Where the $party fails to pay within the agreed period, the $other may demand $remedy.",
            "Is the $party liable if the $thing was $act without the consent of the $other?",
            "Nothing in this clause limits the right of the $other to claim $remedy for a breach of duty.",
            "The court found that the $thing had been $act, and it granted $remedy to the $other.",
            "Under the terms of the lease, $remedy is due only after the $party has $act the $thing.",
        ),
        slots={
            "party": ("tenant", "seller", "employer", "licensee", "carrier", "guarantor"),
            "other": ("landlord", "buyer", "employee", "licensor", "customer", "lender"),
            "thing": ("deposit", "property", "contract", "shipment", "licence", "guarantee"),
            "act": ("transferred", "withheld", "altered", "returned", "assigned", "revoked"),
            "remedy": ("damages", "a refund", "interest", "compensation", "an injunction", "early termination"),
            "rules": ("orders", "decides", "directs"),
        },
    ),
    "russian": Kind(
        openings=(
            "Ответьте на вопрос подробно и простыми словами, приведите примеры. ",
            "Прочитайте рассказ и продолжите его в том же духе. ",
        ),
        sentences=(
            "$time $who долго смотрел на $place и думал о том, что будет дальше.",
            "Почему $who всегда выбирает $place, когда за окном $weather?",
            "$time над городом была $weather, и $who решил вернуться через $place.",
            "Расскажите, как $who нашёл дорогу через $place и чему он научился.",
            "На столе лежала $thing, и $who никому о ней не говорил.",
            "Где находится $thing и зачем она нужна, если кругом $weather?",
        ),
        slots={
            "time": ("Утром", "Вечером", "Однажды", "Зимой", "Вчера", "После обеда"),
            "who": ("старый учитель", "молодой врач", "капитан", "сосед", "мой брат", "инженер"),
            "place": ("реку", "лес", "старый мост", "море", "площадь", "горы"),
            "weather": ("метель", "тишина", "гроза", "темнота", "жара", "осень"),
            "thing": ("книга", "карта", "старая монета", "записка", "фотография", "шкатулка"),
        },
    ),
    "chinese": Kind(
        openings=(
            "请用简单的语言详细回答下面的问题，并举出几个例子说明你的理由。",
            "请阅读下面的故事，然后用同样的风格把它继续写下去，注意前后连贯。",
        ),
        sentences=(
            "$time，$who一个人走过$place，心里想着明天的事情。",
            "为什么$who总是喜欢在$time去$place？",
            "桌子上放着$thing，$who从来没有对别人说起过。",
            "请介绍一下$place的历史，以及$thing在那里有什么用处。",
            "$time的$place非常安静，只有$who还在寻找$thing。",
            "$who学会了怎样使用$thing，后来把方法告诉了$place的人们。",
        ),
        slots={
            "time": ("早晨", "傍晚", "冬天", "春天", "昨天晚上", "下雨天"),
            "who": ("老师", "年轻的医生", "船长", "邻居", "我的哥哥", "工程师"),
            "place": ("小河边", "森林", "老桥", "海边", "广场", "山里的村子"),
            "thing": ("一本书", "一张地图", "一封信", "旧照片", "木头盒子", "一盏灯"),
        },
        joint="",
    ),
    "japanese": Kind(
        openings=(
            "つぎの質問に、やさしい言葉でくわしく答えてください。例もあげてください。",
            "つぎの物語を読んで、おなじ調子でつづきを書いてください。",
        ),
        sentences=(
            "$time、$whoはひとりで$placeを歩きながら、あしたのことを考えていました。",
            "どうして$whoはいつも$timeに$placeへ行くのですか。",
            "つくえの上に$thingがありましたが、$whoはだれにも話しませんでした。",
            "$placeのれきしと、そこで$thingがどう使われるかを教えてください。",
            "$timeの$placeはとても静かで、$whoだけが$thingをさがしていました。",
            "$whoは$thingの使い方をおぼえて、あとで$placeの人たちに教えました。",
        ),
        slots={
            "time": ("朝", "夕がた", "冬", "春", "きのうの夜", "雨の日"),
            "who": ("先生", "わかい医者", "船長", "となりの人", "わたしの兄", "技師"),
            "place": ("川べり", "森", "古い橋", "海べ", "ひろば", "山の村"),
            "thing": ("一冊の本", "地図", "手紙", "古い写真", "木のはこ", "ランプ"),
        },
        joint="",
    ),
    "greek": Kind(
        openings=(
            "Απάντησε στην ερώτηση με απλά λόγια και δώσε παραδείγματα. ",
            "Διάβασε την ιστορία και συνέχισέ την με το ίδιο ύφος. ",
        ),
        sentences=(
            "$time ο $who κοίταζε για ώρα $place και σκεφτόταν το μέλλον.",
            "Γιατί ο $who διαλέγει πάντα $place όταν έξω έχει $weather;",
            "$time στην πόλη είχε $weather και ο $who γύρισε από $place.",
            "Πες μας πώς ο $who βρήκε $thing και τι έμαθε από αυτό.",
            "Πάνω στο τραπέζι υπήρχε $thing και ο $who δεν το είπε σε κανέναν.",
            "Πού βρίσκεται $thing και σε τι χρησιμεύει όταν έχει $weather;",
        ),
        slots={
            "time": ("Το πρωί", "Το βράδυ", "Μια φορά", "Τον χειμώνα", "Χθες", "Το μεσημέρι"),
            "who": ("δάσκαλος", "γιατρός", "καπετάνιος", "γείτονας", "αδελφός μου", "μηχανικός"),
            "place": ("το ποτάμι", "το δάσος", "την παλιά γέφυρα", "τη θάλασσα", "την πλατεία", "τα βουνά"),
            "weather": ("ομίχλη", "ησυχία", "καταιγίδα", "σκοτάδι", "ζέστη", "παγωνιά"),
            "thing": ("ένα βιβλίο", "ένα σημείωμα", "ένα γράμμα", "ένα κλειδί", "ένα κουτί", "ένα ρολόι"),
        },
    ),
}
