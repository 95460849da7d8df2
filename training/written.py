"""Training text written for this project: seeded templates of eight kinds of text.

The packages in sources.toml hold little clinical, contractual and plain narrative text, and no worked algebra. None of
these templates is one of the demo's (`eldr.demo.prompts`), and corpus.py checks that the text holds no demo prompt.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import Template


@dataclass(frozen=True, slots=True)
class Grammar:
    """Sentences with `$slot`s, and what may stand in each slot; `$n` and `$m` are numbers everywhere."""

    sentences: tuple[str, ...]
    slots: Mapping[str, tuple[str, ...]]
    joint: str = " "

    def paragraph(self, rng: random.Random) -> str:
        parts = []
        for sentence in rng.sample(self.sentences, rng.randint(3, 8)):
            fills = {name: rng.choice(texts) for name, texts in self.slots.items()}
            fills |= {"n": str(rng.randint(2, 99)), "m": str(rng.randint(2, 99))}
            parts.append(Template(sentence).substitute(fills))
        return self.joint.join(parts) + "\n\n"


MEDICINE = Grammar(
    sentences=(
        "A $n-year-old $person was admitted with $symptom and $symptom2.",
        "The $person presents with a $course history of $symptom.",
        "On auscultation of the lungs there are $sound over the $side base.",
        "Blood pressure was $n over $m mmHg, the pulse was regular and the temperature was normal.",
        "Past medical history includes $disease and $disease2; there are no known allergies to $drug.",
        "The differential diagnosis includes $disease, $disease2 and, less likely, $disease3.",
        "Laboratory results revealed $lab and an elevated C-reactive protein.",
        "An $test of the $organ was performed and showed $finding.",
        "The $person was started on $drug, $n mg twice daily, for $disease.",
        "$Drug was discontinued because of $symptom and replaced by $drug.",
        "$Disease is a $course disorder of the $organ which typically causes $symptom.",
        "Patients with $disease should be monitored for $symptom and $symptom2.",
        "First-line treatment of $disease is $drug; $drug2 is an alternative in pregnancy.",
        "$Drug inhibits $target and thereby reduces $symptom in patients with $disease.",
        "Common adverse effects of $drug are $symptom, $symptom2 and dry mouth.",
        "The patient was discharged after $n days with follow-up in the $clinic clinic.",
        "Risk factors for $disease include smoking, obesity and a family history of $disease2.",
        "There was no evidence of $disease on $test.",
        "$Disease of the $organ was confirmed by $test and biopsy.",
        "The wound was cleaned, sutured and dressed, and a tetanus booster was given.",
        "What is the recommended dose of $drug for a child with $disease?",
        "How is $disease distinguished from $disease2 on clinical examination?",
        "Symptoms of $disease usually begin with $symptom and progress to $symptom2 over $n days.",
        "The patient denies $symptom, $symptom2 and any recent travel.",
        "Physical therapy and $drug relieved the $symptom, but $symptom2 persisted.",
        "The $organ was enlarged on palpation and tender to percussion.",
        "In renal failure the dose of $drug must be reduced, and $lab must be checked weekly.",
        "Vaccination against $infection is recommended for everyone over $n years of age.",
    ),
    slots={
        "person": ("man", "woman", "patient", "boy", "girl", "pregnant woman", "nurse", "child"),
        "symptom": (
            "fever",
            "chest pain",
            "dyspnoea",
            "fatigue",
            "nausea",
            "abdominal pain",
            "a productive cough",
            "palpitations",
            "vomiting",
            "swelling of both legs",
            "a skin rash",
            "joint pain",
            "blurred vision",
            "shortness of breath",
        ),
        "symptom2": (
            "headache",
            "dizziness",
            "weight loss",
            "night sweats",
            "loss of appetite",
            "back pain",
            "muscle weakness",
            "diarrhoea",
            "insomnia",
            "numbness of the fingers",
            "a sore throat",
            "confusion",
        ),
        "course": ("three-week", "chronic", "acute", "two-day", "progressive", "recurrent"),
        "sound": ("crackles", "wheezes", "reduced breath sounds", "no abnormal sounds"),
        "side": ("left", "right"),
        "disease": (
            "pneumonia",
            "type 2 diabetes",
            "hypertension",
            "asthma",
            "hepatitis",
            "anaemia",
            "heart failure",
            "gastritis",
            "migraine",
            "hypothyroidism",
            "a urinary tract infection",
            "deep vein thrombosis",
            "rheumatoid arthritis",
        ),
        "Disease": ("Pneumonia", "Diabetes", "Asthma", "Hepatitis", "Anaemia", "Epilepsy", "Osteoporosis", "Sepsis"),
        "disease2": ("chronic bronchitis", "pulmonary embolism", "angina", "gout", "stroke", "psoriasis", "cirrhosis"),
        "disease3": ("tuberculosis", "sarcoidosis", "lymphoma", "endocarditis", "pancreatitis"),
        "drug": (
            "metformin",
            "amoxicillin",
            "ibuprofen",
            "prednisolone",
            "furosemide",
            "insulin",
            "paracetamol",
            "warfarin",
            "omeprazole",
            "atorvastatin",
            "a beta blocker",
            "morphine",
            "salbutamol",
            "an antibiotic",
        ),
        "Drug": ("Metformin", "Amoxicillin", "Aspirin", "Prednisolone", "Furosemide", "Warfarin", "Lisinopril"),
        "drug2": ("doxycycline", "methyldopa", "labetalol", "heparin", "azithromycin"),
        "target": ("cyclooxygenase", "the angiotensin receptor", "bacterial cell wall synthesis", "the proton pump"),
        "organ": ("liver", "heart", "kidney", "thyroid", "lung", "stomach", "spleen", "pancreas", "brain"),
        "test": ("ultrasound", "MRI scan", "X-ray examination", "ECG", "endoscopy", "examination by CT"),
        "finding": ("no abnormality", "a small effusion", "diffuse enlargement", "a focal lesion", "calcification"),
        "lab": (
            "low haemoglobin",
            "raised creatinine",
            "a low platelet count",
            "raised liver enzymes",
            "low potassium",
        ),
        "clinic": ("cardiology", "diabetes", "respiratory", "outpatient", "renal"),
        "infection": ("influenza", "measles", "hepatitis B", "tetanus", "pneumococcal disease"),
    },
)

LAW = Grammar(
    sentences=(
        "This Agreement is made on the date below between the $party and the $other.",
        "The $party agrees to $duty, and the $other agrees to pay the sum of $$$n,000 in consideration thereof.",
        "In the event of $breach, the $other may terminate this Agreement upon $n days' written notice.",
        "The $party shall indemnify and hold harmless the $other against all claims arising from $breach.",
        "No waiver of any provision of this Agreement shall be deemed a waiver of any other provision.",
        "Any dispute arising out of this $paper shall be settled by $forum.",
        "The plaintiff alleges that the defendant is liable for $breach under section $n of the Act.",
        "The court held that the $paper was void because of $defect.",
        "The judge dismissed the appeal and ordered the defendant to pay $remedy and costs.",
        "Is a $party entitled to $remedy where the $other has committed $breach?",
        "Subject to clause $n, the $party shall not assign the $paper without prior written consent.",
        "A $party who relies on $defect bears the burden of proof.",
        "The $paper shall be governed by and construed in accordance with the laws of $place.",
        "The $other is liable for $breach unless it proves that it was not at fault.",
        "Notwithstanding the foregoing, neither party shall be liable for indirect or consequential damages.",
        "The right to claim $remedy expires $n months after the $party became aware of $breach.",
        "The witness testified that the $party had signed the $paper in the presence of the $other.",
        "Upon termination, the $party shall return all $goods to the $other within $n days.",
        "The statute provides that whoever commits $breach shall be punished by a fine.",
        "Under the lease, the tenant must keep the premises in good repair and pay rent in advance.",
        "The landlord may withhold the deposit only to the extent of unpaid rent or damage to the premises.",
        "Counsel for the $party argued that $breach had not been established beyond reasonable doubt.",
        "If any provision of this $paper is held invalid, the remaining provisions shall remain in force.",
        "The employer dismissed the employee without notice on the ground of $breach.",
        "The licensee may not copy, modify or distribute the $goods except as permitted by the $paper.",
        "What must a $party prove in order to recover $remedy for $breach?",
        "The parties hereby agree that time is of the essence for the delivery of the $goods.",
    ),
    slots={
        "party": (
            "tenant",
            "seller",
            "employer",
            "licensee",
            "contractor",
            "borrower",
            "carrier",
            "trustee",
            "supplier",
            "insured",
        ),
        "other": (
            "landlord",
            "buyer",
            "employee",
            "licensor",
            "client",
            "lender",
            "customer",
            "beneficiary",
            "insurer",
            "company",
        ),
        "duty": ("deliver the goods", "perform the services", "maintain the property", "transfer the title"),
        "breach": (
            "a material breach",
            "negligence",
            "non-payment",
            "misrepresentation",
            "unlawful termination",
            "fraud",
            "infringement of copyright",
            "breach of confidence",
            "late delivery",
            "unjust enrichment",
        ),
        "defect": ("mistake", "duress", "undue influence", "lack of consideration", "illegality", "want of form"),
        "remedy": (
            "damages",
            "compensation",
            "a refund of the price",
            "interest",
            "an injunction",
            "specific performance",
        ),
        "paper": ("contract", "lease", "licence", "guarantee", "agreement", "deed", "will", "policy"),
        "forum": ("arbitration", "the competent court", "mediation", "the courts of the seller's domicile"),
        "goods": ("goods", "documents", "shares", "software", "premises", "equipment"),
        "place": ("England", "the State", "the Republic", "Scotland", "the Province"),
    },
)

RUSSIAN = Grammar(
    sentences=(
        "$who вышел из дома рано и пошёл $where.",
        "На улице было $weather, и люди спешили $where.",
        "Мой друг рассказал мне историю о том, как он потерял $thing.",
        "Она спросила, почему $who не хочет говорить об этом.",
        "$when мы сидели у окна, пили чай и слушали музыку.",
        "Никто не знал, откуда взялась $thing и кому она принадлежит.",
        "Объясните, пожалуйста, что означает это слово и когда его используют.",
        "Если завтра будет $weather, мы поедем $where.",
        "$who работает в большом городе и любит свою работу.",
        "Дети играли во дворе, а $who читал газету.",
        "Жизнь в деревне тихая и спокойная, особенно осенью.",
        "Я думаю, что самое главное в жизни это семья и друзья.",
        "$when он написал длинное письмо своей матери.",
        "Как приготовить вкусный ужин, если дома есть только хлеб и картошка?",
        "Учёные нашли новый способ, который помогает людям жить дольше.",
    ),
    slots={
        "who": ("Старик", "Студент", "Директор", "Художник", "Мальчик", "Доктор", "Писатель"),
        "where": ("в магазин", "на вокзал", "к морю", "домой", "в школу", "на рынок", "через мост"),
        "weather": ("холодно", "темно", "тепло", "очень тихо", "сыро", "солнечно"),
        "thing": ("книга", "картина", "тетрадь", "лампа", "шляпа", "монета"),
        "when": ("Вчера вечером", "Утром", "Однажды", "Летом", "Ночью", "В воскресенье"),
    },
)

CHINESE = Grammar(
    sentences=(
        "$when，$who从家里出来，慢慢地走到$where。",
        "外面$weather，很多人都在等公共汽车。",
        "我的朋友告诉我，他在$where找到了$thing。",
        "你为什么不愿意和$who谈谈这件事情呢？",
        "请说明这个词的意思，并且写出两个句子。",
        "如果明天$weather，我们就去$where看看。",
        "$who在城市里工作，每天都很忙，但是他很高兴。",
        "孩子们在院子里玩，$who在旁边看书。",
        "没有人知道$thing是从哪里来的，也不知道它是谁的。",
        "我认为生活中最重要的是家人、朋友和健康。",
        "$when他给母亲写了一封很长的信。",
        "科学家发现了一种新的方法，可以帮助人们解决这个问题。",
        "这个故事发生在很久以前的一个小村子里。",
        "怎样才能学好中文？请给我一些建议。",
    ),
    slots={
        "who": ("老人", "学生", "经理", "画家", "小女孩", "医生", "作家"),
        "where": ("商店", "火车站", "学校", "公园", "图书馆", "市场", "山上"),
        "weather": ("下着大雨", "很冷", "非常安静", "天气很好", "刮着风", "下雪了"),
        "thing": ("那本书", "一张画", "一个箱子", "一把钥匙", "旧帽子", "手表"),
        "when": ("昨天晚上", "早上", "有一天", "夏天", "星期天", "半夜"),
    },
    joint="",
)

JAPANESE = Grammar(
    sentences=(
        "$whenに、$whoは家を出て$whereまで歩いて行きました。",
        "外は$weatherので、みんな急いで帰りました。",
        "友だちは$whereで$thingを見つけたと話してくれました。",
        "なぜ$whoはそのことについて話したくないのでしょうか。",
        "この言葉の意味を説明して、文を二つ作ってください。",
        "もし明日$weatherなら、いっしょに$whereへ行きましょう。",
        "$whoは大きな町で働いていて、毎日とてもいそがしいです。",
        "子どもたちは庭で遊び、$whoは新聞を読んでいました。",
        "$thingがどこから来たのか、だれも知りませんでした。",
        "人生でいちばん大切なものは家族と友だちだと思います。",
        "$whenに母へ長い手紙を書きました。",
        "むかしむかし、あるところに小さな村がありました。",
        "おいしい料理を作るにはどうすればいいですか。",
        "新しい方法が見つかり、この問題をかんたんに解くことができます。",
    ),
    slots={
        "who": ("おじいさん", "学生", "社長", "画家", "男の子", "お医者さん", "作家"),
        "where": ("お店", "駅", "学校", "公園", "図書館", "市場", "海"),
        "weather": ("雨がふっている", "とてもさむい", "しずかな", "よい天気", "風がつよい", "くらい"),
        "thing": ("その本", "古い絵", "小さな箱", "かぎ", "ぼうし", "とけい"),
        "when": ("きのうのばん", "朝", "ある日", "夏", "日曜日", "よる"),
    },
    joint="",
)

GREEK = Grammar(
    sentences=(
        "$when ο $who βγήκε από το σπίτι και πήγε $where.",
        "Έξω έκανε $weather και ο κόσμος βιαζόταν να γυρίσει.",
        "Ο φίλος μου είπε ότι έχασε $thing στο δρόμο.",
        "Γιατί δεν θέλει ο $who να μιλήσει για αυτό το θέμα;",
        "Εξήγησε τι σημαίνει αυτή η λέξη και γράψε δύο προτάσεις.",
        "Αν αύριο κάνει $weather, θα πάμε όλοι μαζί $where.",
        "Ο $who δουλεύει στην πόλη και αγαπάει τη δουλειά του.",
        "Τα παιδιά έπαιζαν στην αυλή και ο $who διάβαζε εφημερίδα.",
        "Κανείς δεν ήξερε από πού ήρθε και σε ποιον ανήκει.",
        "Νομίζω ότι το πιο σημαντικό στη ζωή είναι η οικογένεια και οι φίλοι.",
        "$when έγραψε ένα μεγάλο γράμμα στη μητέρα του.",
        "Μια φορά κι έναν καιρό ήταν ένα μικρό χωριό κοντά στη θάλασσα.",
        "Πώς μπορώ να μαγειρέψω ένα καλό φαγητό για το βράδυ;",
        "Οι επιστήμονες βρήκαν έναν νέο τρόπο που βοηθάει τους ανθρώπους.",
    ),
    slots={
        "who": ("γέρος", "φοιτητής", "διευθυντής", "ζωγράφος", "μικρός", "γιατρός", "συγγραφέας"),
        "where": ("στην αγορά", "στον σταθμό", "στη θάλασσα", "στο σχολείο", "στο χωριό", "στο βουνό"),
        "weather": ("κρύο", "ζέστη", "ησυχία", "πολλή βροχή", "αέρα"),
        "thing": ("το βιβλίο", "την εικόνα", "το καπέλο", "το κλειδί", "το ρολόι", "τα γυαλιά"),
        "when": ("Χθες το βράδυ", "Το πρωί", "Μια μέρα", "Το καλοκαίρι", "Τη νύχτα", "Την Κυριακή"),
    },
)


def linear_equation(rng: random.Random) -> str:
    a, x, b = rng.randint(2, 19), rng.randint(2, 30), rng.randint(1, 60)
    sign, moved = ("+", a * x) if rng.random() < 0.5 else ("-", a * x)
    right = moved + b if sign == "+" else moved - b
    return f"{a}x {sign} {b} = {right}; {a}x = {moved}; x = {x}. "


def quadratic_equation(rng: random.Random) -> str:
    first, second = rng.randint(1, 12), rng.randint(1, 12)
    total, product = first + second, first * second
    root = abs(first - second)
    return (
        f"x^2 - {total}x + {product} = 0; D = {total}^2 - 4*{product} = {root**2}; sqrt(D) = {root}; "
        f"x1 = ({total} + {root})/2 = {max(first, second)}, x2 = {min(first, second)}. "
    )


def arithmetic_chain(rng: random.Random) -> str:
    value, steps = rng.randint(2, 40), []
    for _ in range(rng.randint(3, 7)):
        other = rng.randint(2, 12)
        sign, result = rng.choice([("+", value + other), ("-", value - other), ("*", value * other)])
        steps.append(f"{value} {sign} {other} = {result}")
        value = result if abs(result) < 5000 else rng.randint(2, 40)
    return "; ".join(steps) + ". "


def derivative(rng: random.Random) -> str:
    a, b, c, n, k = (rng.randint(2, 9) for _ in range(5))
    value = a * n * k ** (n - 1) + b
    return f"f(x) = {a}x^{n} + {b}x - {c}; f'(x) = {a * n}x^{n - 1} + {b}; f'({k}) = {value}. "


def fraction_sum(rng: random.Random) -> str:
    a, b, c = (rng.randint(1, 40) for _ in range(3))
    return f"{a}/{c} + {b}/{c} = ({a} + {b})/{c} = {a + b}/{c}. "


def determinant(rng: random.Random) -> str:
    a, b, c, d = (rng.randint(1, 20) for _ in range(4))
    return f"det [{a}, {b}; {c}, {d}] = {a}*{d} - {b}*{c} = {a * d} - {b * c} = {a * d - b * c}. "


def expansion(rng: random.Random) -> str:
    a, b, c = (rng.randint(2, 30) for _ in range(3))
    return f"({a} + {b}) * {c} = {a}*{c} + {b}*{c} = {a * c} + {b * c} = {(a + b) * c}. "


EXERCISES: tuple[Callable[[random.Random], str], ...] = (
    linear_equation, quadratic_equation, arithmetic_chain, derivative, fraction_sum, determinant, expansion,
)  # fmt: skip


def algebra(rng: random.Random) -> str:
    """A page of worked exercises, numbered or not, of one sort or mixed."""
    one = rng.choice(EXERCISES)
    mixed, numbered = rng.random() < 0.5, rng.random() < 0.5
    parts = []
    for number in range(1, rng.randint(4, 12)):
        exercise = rng.choice(EXERCISES) if mixed else one
        parts.append((f"{number}) " if numbered else "") + exercise(rng))
    return "".join(parts) + "\n\n"


WRITERS: Mapping[str, Callable[[random.Random], str]] = {
    "mathematics": algebra,
    "medicine": MEDICINE.paragraph,
    "law": LAW.paragraph,
    "russian": RUSSIAN.paragraph,
    "chinese": CHINESE.paragraph,
    "japanese": JAPANESE.paragraph,
    "greek": GREEK.paragraph,
}


def write_text(kind: str, size_bytes: int, seed: int) -> str:
    """About `size_bytes` of text of a kind in WRITERS, the same for the same seed."""
    rng = random.Random(f"{kind} {seed}")
    parts: list[str] = []
    written = 0
    while written < size_bytes:
        part = WRITERS[kind](rng)
        parts.append(part)
        written += len(part.encode())
    return "".join(parts)
