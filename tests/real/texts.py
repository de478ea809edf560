"""200 texts of several scripts, with spaces, code and special tokens in many joins; and 200 with
digits; and 200 with characters that are rare."""

import random

LINES = [
    "The quick brown fox jumps over the lazy dog.",
    "  leading and   inner   spaces  ",
    "tabs\tand\ttabs\n\nnew lines\n \n  x",
    "def f(x):\n    return x**n + x  # comment",
    "Café déjà vu, naïve façade – “quotes” …",
    "Быстрая коричневая лиса прыгает через ленивую собаку.",
    "Η γρήγορη καφέ αλεπού πηδάει πάνω από το τεμπέλικο σκυλί.",
    "敏捷的棕色狐狸跳过了懒狗。人工智能语言模型。",
    "すばやい茶色の狐がのろまな犬を飛び越える。カタカナ",
    "빠른 갈색 여우가 게으른 개를 뛰어넘는다.",
    "الثعلب البني السريع يقفز فوق الكلب الكسول.",
    "השועל החום המהיר קופץ מעל הכלב העצלן.",
    "तेज भूरी लोमड़ी आलसी कुत्ते के ऊपर कूदती है।",
    "สุนัขจิ้งจอกสีน้ำตาลกระโดดข้ามสุนัขขี้เกียจ",
    "Hello 👋🏽 world 🌍! 👩‍👩‍👧‍👦 ☃ ✓",
    "I'm you're he'll they'd WE'VE I'M can't",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <file_sep>",
    "e\u0301 vs é, A\u030a vs Å, ﬁ ligature, \u00a0nbsp\u2003em",
    "$ & % (brackets) [x] {y} <z> a/b\\c #tag @user http://example.com/?q=x&r=y",
    "1234567890 3.14159 1,000,000 ٣٤٥ ½ ² Ⅷ",
]


def texts_of(lines: list[str], count: int = 200) -> list[str]:
    """The lines, and their words in other joins."""
    rng, texts = random.Random(0), list(lines)
    words = [word for line in lines for word in line.split(" ")]
    while len(texts) < count:
        chosen = rng.choices(words, k=rng.randint(1, 25))
        texts.append(rng.choice([" ", "  ", "\n", "", ", "]).join(chosen))
    return texts


TEXTS = texts_of(LINES[:-1])
WITH_DIGITS = texts_of(LINES)
# What splits at other characters than spaces, or is none that anybody writes.
ODD = [
    "\x00\x01 \x7f \x1b[31m",
    "\ufeffBOM \u200b\u200d",
    "a\x85b \u2028 \u2029 \x0b\x0c\x1c x",
    "a\u00adb ﷺ 𝔘𝔫𝔦 🇩🇪🇫🇷 \U0010ffff \u0378",
    "Ünï CASE ǅ straße İstanbul ΣΑΣ ﬃ",
    "I'M'LL'Ve 'S's ’s",
    "1 22 333 4444 55555 ١٢٣٤٥ १२३४५ ⅷ½²",
    " \n \r\n\t\t \u3000 x\n\n\n",
    "x" * 300,
    "Cửa Việt",
    "a ་ b́̂c กำ",
    "===>>> ///*** !!! ¿¡ «»「」 ^~|`$+",
]
WITH_ODD = texts_of(LINES + ODD)
