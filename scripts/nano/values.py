"""Draws random words, names, amounts, dates and ids for the cells, labels and fields of synthetic documents.

Everything is drawn from the `random.Random` that is passed in. Texts are ASCII: letters, digits, space and
`.,-%$:/()#&+'`. A twelfth of the words is made up from syllables, so that a reader cannot guess them.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random


def _words(text: str) -> list[str]:
    return text.split()


NOUNS = _words("""
account acid age agent air amount angle annex answer apple area asset atom audit average award axis badge balance
band bank base basis batch beam bill block board body bolt bond bonus book border box branch brand bread bridge
brief budget build bureau bus button buyer cable cake call camera capital carbon card cargo carrier case cash cell
center chain chair change channel charge chart check chip city claim class clerk client clock cloud coal coast code
coffee coil coin color column concrete contact content contract copper copy corn cost cotton council count county
course court cover credit crop crowd cube cup current curve customer cycle data date day deal debt deck degree delay
demand density depth desk detail device diesel digit disk district dock door dose draft drive drum dust duty earth
edge effect effort electron energy engine entry equity error estate event exam expense export fabric factor farm fee
fiber field file film filter fleet floor flow fluid force forest form frame freight fruit fuel fund garden gas gate
gear glass goal gold grade grain grant graph grid group growth guard guide habitat hand harbor heat height hire home
hospital hotel hour house import income index ink input insurance interest iron island item job joint journal key
kit label labor lake land laser layer lead leaf lease ledger lens lesson letter level library license light limit
line lint liquid list load loan lobby lock loss lot machine mail manager map margin market mass material matrix meal
measure meat media member memo metal meter method mile milk mine model module money month motor mouse museum nerve
network night node noise note number nurse object ocean offer office oil option orbit order output oven owner oxygen
package page paint panel paper park part patent path patient payment pen people period permit phase phone photo pipe
plan plant plate point policy pool port post power press price printer prize process product profit program project
proof protein pump pupil quality quantity quarter queue quota radio rail rain range rate ratio reach record refund
region rent repair report reserve result return revenue rice ring risk river road rock role roof room root route row
rule safety salary sale salt sample sand scale school score screen sea seat sector seed sensor series service shape
share sheet shelf shift ship shop signal silver site size skill slope snow soil solar solid sound source space speed
spring staff stage station steel step stock stone storage store storm stream street student study sugar sum supply
survey switch system table tank target task tax team test text theory ticket tile time title tool topic total tower
town track trade traffic train transit travel tree trend trial truck trust tube tunnel unit user value valve vendor
vessel view volume voltage wage wall waste water wave week weight wheel wind window wire wood work worker yard year
yield zinc zone
""")

ADJECTIVES = _words("""
active annual basic big blue bright broad central clean clear cold common cool daily deep direct dry early east fast
final fine first fixed flat free fresh full gross hard heavy high hot inner internal large last late left legal
light linear liquid local long low main major mean minor mixed mobile modern net new next normal north old open
other outer paid past plain prime public pure quick quiet rapid raw ready real red regular remote right rural safe
second secure senior short simple slow small smart smooth soft solid south special stable standard steady strong
thermal thin third tight total upper urban valid warm weekly west white wide yellow young
""")

FIRST_NAMES = _words("""
Ada Alan Alma Amir Ana Anton Aria Ben Bianca Carl Carla Chen Clara Dana David Diego Elena Eli Emma Erik Eva Felix
Fiona Grace Hana Hugo Ida Igor Ines Ivan Jack Jana John Jonas Judy Julia Kai Karim Kate Lara Leo Lina Lucas Luna
Maria Mark Maya Milo Mina Nadia Nina Noah Nora Olga Omar Oscar Paul Petra Priya Quinn Rosa Ruth Ryan Sam Sara Sofia
Tariq Tess Theo Tom Uma Vera Victor Wanda Will Yara Yusuf Zoe
""")

LAST_NAMES = _words("""
Abbott Adams Ali Baker Becker Bell Berg Brown Chavez Clark Cohen Cole Cruz Dahl Davis Diaz Dunn Evans Fischer Ford
Garcia Gomez Grant Gray Haas Hall Hart Hill Hughes Ito Jones Kaya Keller Kelly Khan Kim King Klein Kumar Lang Lee
Lopez Marsh Meyer Mills Moore Nash Nguyen Novak Olsen Owens Park Patel Perez Quist Reed Rossi Roy Ruiz Sato Shah
Silva Smith Stone Suzuki Tan Torres Turner Vega Wagner Walsh Wang Ward Weber West White Wolf Wong Wood Young Zhang
""")

CITIES = _words("""
Accra Adelaide Algiers Athens Austin Basel Bergen Berlin Bogota Boston Bremen Cairo Calgary Chicago Cork Dallas
Delhi Denver Dubai Dublin Geneva Genoa Ghent Graz Hanoi Havana Helsinki Houston Jakarta Kyoto Lagos Leeds Leipzig
Lima Lisbon London Lyon Madrid Malmo Manila Miami Milan Montreal Mumbai Munich Nairobi Naples Nice Osaka Oslo Ottawa
Paris Perth Porto Prague Quito Riga Rome Rotterdam Santiago Seattle Seoul Sydney Tampa Tokyo Toronto Tunis Turin
Utrecht Valencia Vienna Warsaw Zurich
""")

COMPANY_ENDS = ("Inc", "Ltd", "GmbH", "AG", "LLC", "Corp", "Group", "Labs", "Works", "Foods", "Tech", "& Co", "& Sons")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
UNITS = ("kg", "g", "t", "m", "km", "mm", "L", "mL", "W", "kW", "h", "min", "s", "GB", "MB", "pcs", "V", "C")
CODE_PREFIXES = ("INV", "PO", "ID", "SKU", "REF", "ORD", "LOT", "TK", "CN", "BX", "KX", "RN", "QT", "DN")
MADE_UP = 0.08  # share of words that are in no dictionary

_ONSETS = _words(
    "b c d f g h j k l m n p r s t v w y z bl br ch cl cr dr fl fr gl gr pl pr qu sh sk sl sp st th tr tw x"
)
_VOWELS = _words("a e i o u a e i o u ai ea ee io oa ou y")
_CODAS = ["", "", "", "", *_words("b ck d ft g l m n nd ng nt p r rd rk rn s ss st t x z")]
_MARKS = ("(a)", "#2", "A/B", "R&D", "Q&A", "No. 4", "C+", "24/7", "(net)", "1st", "2nd", "n/a", "Men's", "Year's end")


def made_up_word(rng: Random) -> str:
    """Draws a pronounceable, meaningless lower case word of one to three syllables."""
    syllables = rng.choice((1, 2, 2, 2, 3))
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables))[:11]


def noun(rng: Random) -> str:
    return made_up_word(rng) if rng.random() < MADE_UP else rng.choice(NOUNS)


def adjective(rng: Random) -> str:
    return made_up_word(rng) if rng.random() < MADE_UP else rng.choice(ADJECTIVES)


def word(rng: Random) -> str:
    """Draws one lower case word."""
    return noun(rng) if rng.random() < 0.75 else adjective(rng)


def cased(rng: Random, text: str) -> str:
    """Changes the case: mostly to one initial capital, sometimes to lower case or all capitals."""
    chance = rng.random()
    if chance < 0.75:
        return text[:1].upper() + text[1:]
    return text if chance < 0.9 else text.upper()


def phrase(rng: Random, longest: int = 14) -> str:
    """Draws one to three words, at most `longest` characters."""
    words = [noun(rng)]
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        words.insert(0, adjective(rng) if rng.random() < 0.6 else noun(rng))
    while len(words) > 1 and len(" ".join(words)) > longest:
        words.pop(0)
    text = " ".join(words)[:longest].strip()
    if rng.random() < 0.2:
        return text.title()
    return cased(rng, text)


def person(rng: Random) -> str:
    """Draws a name such as 'Ada Keller', 'A. Keller', 'Keller', or one that is made up."""
    last = made_up_word(rng).capitalize() if rng.random() < MADE_UP else rng.choice(LAST_NAMES)
    first = rng.choice(FIRST_NAMES)
    return rng.choice((f"{first} {last}", f"{first[0]}. {last}", f"{first} {last}", last))


def company(rng: Random) -> str:
    name = noun(rng).capitalize() if rng.random() < 0.6 else rng.choice(LAST_NAMES)
    return f"{name} {rng.choice(COMPANY_ENDS)}"


def city(rng: Random) -> str:
    return made_up_word(rng).capitalize() if rng.random() < 0.15 else rng.choice(CITIES)


def magnitude(rng: Random, digits: int = 5) -> int:
    """Draws an integer below 10**k, for a k from 1 to `digits`."""
    return rng.randrange(10 ** rng.randint(1, digits))


def integer(rng: Random) -> str:
    value = magnitude(rng)
    return f"{value:,}" if rng.random() < 0.5 else str(value)


def amount(rng: Random) -> str:
    """Draws an amount, mostly with two decimals, with or without commas, a currency or a sign."""
    value = magnitude(rng, 6) / 100 if rng.random() < 0.7 else magnitude(rng, 5)
    text = f"{value:,.2f}" if rng.random() < 0.8 else f"{value:.2f}"
    chance = rng.random()
    if chance < 0.6 or not value:
        return text
    if chance < 0.75:
        return f"${text}" if rng.random() < 0.6 else f"${value:,.0f}"
    if chance < 0.85:
        return f"{text} {rng.choice(('EUR', 'USD', 'CHF', 'GBP'))}"
    return f"-{text}" if rng.random() < 0.6 else f"({text})"


def decimal(rng: Random) -> str:
    """Draws a number with zero to three decimals, sometimes negative or with a plus."""
    text = f"{magnitude(rng, 4) / 10:.{rng.choice((0, 1, 1, 1, 2, 3))}f}"
    chance = rng.random()
    if not float(text):
        return text
    return f"-{text}" if chance < 0.15 else f"+{text}" if chance < 0.2 else text


def percent(rng: Random) -> str:
    value = 1 + rng.random() * 99
    sign = "-" if rng.random() < 0.1 else ""
    return f"{sign}{value:.{rng.choice((0, 0, 1, 1, 2))}f}%"


def measure(rng: Random) -> str:
    return f"{decimal(rng)} {rng.choice(UNITS)}"


def year(rng: Random) -> str:
    return str(rng.randint(1990, 2035))


def date(rng: Random, style: int | None = None) -> str:
    """Draws a day in one of six spellings."""
    y, m, d = rng.randint(1995, 2032), rng.randint(1, 12), rng.randint(1, 28)
    name = MONTHS[m - 1]
    spellings = (
        f"{y}-{m:02}-{d:02}",
        f"{d} {name} {y}",
        f"{m:02}/{d:02}/{y}",
        f"{d:02}.{m:02}.{y}",
        f"{name} {d}, {y}",
        f"{name} {y}",
    )
    return spellings[rng.randrange(len(spellings)) if style is None else style % len(spellings)]


def clock(rng: Random) -> str:
    return f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"


def _letters(rng: Random, count: int) -> str:
    return "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(count))


def _digits(rng: Random, count: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(count))


def code(rng: Random) -> str:
    """Draws an id such as 'INV-20418', 'A7-331', 'KX9042', '#1184', '48-1207'."""
    shape = rng.randrange(6)
    if shape == 0:
        return f"{rng.choice(CODE_PREFIXES)}-{_digits(rng, rng.randint(3, 5))}"
    if shape == 1:
        return f"{_letters(rng, 1)}{_digits(rng, 1)}-{_digits(rng, 3)}"
    if shape == 2:
        return _letters(rng, 2) + rng.choice(("", "-")) + _digits(rng, 4)
    if shape == 3:
        return f"#{_digits(rng, rng.randint(3, 5))}"
    if shape == 4:
        return f"{_digits(rng, 2)}-{_digits(rng, 4)}"
    return f"{_letters(rng, 1)}{_digits(rng, 2)}{_letters(rng, 1)}/{_digits(rng, 2)}"


def flag(rng: Random) -> str:
    return rng.choice(("yes", "no", "Yes", "No", "OK", "open", "closed", "paid", "new", "A", "B", "C", "-", "x", "n/a"))


def marked(rng: Random) -> str:
    """Draws a word with one of the rarer punctuation marks."""
    return f"{word(rng).capitalize()[:8]} {rng.choice(_MARKS)}" if rng.random() < 0.6 else rng.choice(_MARKS)


def phone(rng: Random) -> str:
    return f"+{rng.randint(1, 99)} {_digits(rng, 3)} {_digits(rng, 4)}"


def short_word(rng: Random) -> str:
    return cased(rng, word(rng))


CELLS: dict[str, Callable[[Random], str]] = {
    "word": short_word,
    "phrase": phrase,
    "person": person,
    "company": company,
    "city": city,
    "integer": integer,
    "amount": amount,
    "decimal": decimal,
    "percent": percent,
    "measure": measure,
    "year": year,
    "date": date,
    "clock": clock,
    "code": code,
    "flag": flag,
    "marked": marked,
}
NUMERIC = frozenset({"integer", "amount", "decimal", "percent", "measure", "year"})
_WEIGHTS = (20, 16, 6, 3, 4, 12, 14, 8, 7, 3, 2, 7, 2, 10, 2, 1)
CELL_LONGEST = 14


def column_kind(rng: Random) -> str:
    """Draws one of the keys of `CELLS`."""
    return rng.choices(tuple(CELLS), _WEIGHTS)[0]


def cell_text(rng: Random, kind: str) -> str:
    """Draws a text of a column kind, at most `CELL_LONGEST` characters. Raises KeyError for an unknown kind."""
    text = CELLS[kind](rng)
    while len(text) > CELL_LONGEST:
        text = CELLS[kind](rng)
    return text


def heading(rng: Random) -> str:
    """Draws a column heading of one to three words."""
    return phrase(rng, 12) if rng.random() < 0.5 else cased(rng, noun(rng))


def snake_case(label: str) -> str:
    """Converts 'Invoice number' to 'invoice_number'; punctuation is dropped."""
    kept = "".join(c if c.isalnum() else " " for c in label.lower().replace("'", ""))
    return "_".join(kept.split())
