"""Questions of general knowledge with short answers, written for the examples."""

#: Question, and pairs of subject and answer, by topic. ``|`` separates answers that are right, the usual one first.
TOPICS = {
    "capitals": (
        "What is the capital of {}?",
        "Argentina: Buenos Aires, Australia: Canberra, Austria: Vienna, Belgium: Brussels, Bulgaria: Sofia, "
        "Canada: Ottawa, Chile: Santiago, China: Beijing, Colombia: Bogota|Bogotá, Cuba: Havana, Denmark: Copenhagen, "
        "Egypt: Cairo, Ethiopia: Addis Ababa, Finland: Helsinki, France: Paris, Germany: Berlin, Ghana: Accra, "
        "Greece: Athens, Hungary: Budapest, Iceland: Reykjavik|Reykjavík, India: New Delhi|Delhi, Indonesia: Jakarta, "
        "Iran: Tehran, Iraq: Baghdad, Ireland: Dublin, Italy: Rome, Jamaica: Kingston, Japan: Tokyo, Jordan: Amman, "
        "Kenya: Nairobi, Lebanon: Beirut, Malta: Valletta, Mexico: Mexico City, Mongolia: Ulaanbaatar|Ulan Bator, "
        "Morocco: Rabat, Nepal: Kathmandu, Netherlands: Amsterdam, New Zealand: Wellington, Nigeria: Abuja, "
        "Norway: Oslo, Pakistan: Islamabad, Peru: Lima, Poland: Warsaw, Portugal: Lisbon, Qatar: Doha, "
        "Romania: Bucharest, Russia: Moscow, Senegal: Dakar, Serbia: Belgrade, South Korea: Seoul, Spain: Madrid, "
        "Sweden: Stockholm, Syria: Damascus, Thailand: Bangkok, Tunisia: Tunis, Turkey: Ankara, Uganda: Kampala, "
        "Ukraine: Kyiv|Kiev, Uruguay: Montevideo, Venezuela: Caracas, Vietnam: Hanoi, Zambia: Lusaka",
    ),
    "authors": (
        "Who wrote {}?",
        "Hamlet: William Shakespeare|Shakespeare, Macbeth: William Shakespeare|Shakespeare, Emma: Jane Austen|Austen, "
        "Romeo and Juliet: William Shakespeare|Shakespeare, Pride and Prejudice: Jane Austen|Austen, "
        "Oliver Twist: Charles Dickens|Dickens, Great Expectations: Charles Dickens|Dickens, "
        "War and Peace: Leo Tolstoy|Tolstoy, Anna Karenina: Leo Tolstoy|Tolstoy, "
        "Crime and Punishment: Fyodor Dostoevsky|Dostoevsky, The Trial: Franz Kafka|Kafka, "
        "Moby-Dick: Herman Melville|Melville, Frankenstein: Mary Shelley|Shelley, Dracula: Bram Stoker|Stoker, "
        "Jane Eyre: Charlotte Bronte|Charlotte Brontë|Bronte|Brontë, Don Quixote: Miguel de Cervantes|Cervantes, "
        "Les Miserables: Victor Hugo|Hugo, Madame Bovary: Gustave Flaubert|Flaubert, Faust: Goethe|"
        "Johann Wolfgang von Goethe|Christopher Marlowe, The Odyssey: Homer, The Iliad: Homer, The Aeneid: Virgil, "
        "The Divine Comedy: Dante|Dante Alighieri, Treasure Island: Robert Louis Stevenson|Stevenson, "
        "Robinson Crusoe: Daniel Defoe|Defoe, Walden: Henry David Thoreau|Thoreau, Ulysses: James Joyce|Joyce, "
        "1984: George Orwell|Orwell, Animal Farm: George Orwell|Orwell, The Hobbit: J.R.R. Tolkien|J. R. R. Tolkien|"
        "Tolkien, The Time Machine: H.G. Wells|H. G. Wells|Wells, The Jungle Book: Rudyard Kipling|Kipling",
    ),
    "opposites": (
        "What is the opposite of {}?",
        "hot: cold, big: small|little, fast: slow, early: late, light: dark|heavy|darkness, old: young|new, "
        "rich: poor, strong: weak, wet: dry, full: empty, hard: soft|easy, high: low, long: short, loud: quiet|soft, "
        "narrow: wide|broad, near: far, open: closed|close|shut, pull: push, buy: sell, remember: forget, win: lose, "
        "begin: end, arrive: leave|depart, love: hate, war: peace, day: night, success: failure, always: never, "
        "inside: outside, asleep: awake, above: below, sharp: blunt|dull, thick: thin, deep: shallow, brave: cowardly|"
        "coward|timid|fearful, major: minor, import: export, maximum: minimum",
    ),
    "young animals": (
        "What is a young {} called?",
        "dog: puppy|pup, cat: kitten, cow: calf, horse: foal|colt, sheep: lamb, goat: kid, pig: piglet, "
        "chicken: chick, duck: duckling, goose: gosling, swan: cygnet, bear: cub, lion: cub, deer: fawn, "
        "kangaroo: joey, frog: tadpole, owl: owlet, eagle: eaglet, hare: leveret, whale: calf, fox: cub|kit|pup",
    ),
    "elements": (
        "Which chemical element has the symbol {}?",
        "H: Hydrogen, He: Helium, Li: Lithium, C: Carbon, N: Nitrogen, O: Oxygen, F: Fluorine, Ne: Neon, Na: Sodium, "
        "Mg: Magnesium, Al: Aluminum|Aluminium, Si: Silicon, P: Phosphorus, S: Sulfur|Sulphur, Cl: Chlorine, "
        "K: Potassium, Ca: Calcium, Ti: Titanium, Fe: Iron, Ni: Nickel, Cu: Copper, Zn: Zinc, Ag: Silver, Sn: Tin, "
        "I: Iodine, W: Tungsten, Pt: Platinum, Au: Gold, Hg: Mercury, Pb: Lead, U: Uranium",
    ),
    "continents": (
        "On which continent is {}?",
        "Algeria: Africa, Angola: Africa, Bolivia: South America, Brazil: South America, Cambodia: Asia, "
        "Congo: Africa, Croatia: Europe, Ecuador: South America, Estonia: Europe, Guatemala: North America, "
        "Honduras: North America, Laos: Asia, Mali: Africa, Paraguay: South America, Saudi Arabia: Asia, "
        "Somalia: Africa, Sri Lanka: Asia, Sudan: Africa, Switzerland: Europe, Tanzania: Africa, "
        "the Czech Republic: Europe",
    ),
}  # fmt: skip


def question(topic: str, subject: str) -> str:
    """Write a prompt. The completion begins with the space behind it.

    Args:
        topic: Key of ``TOPICS``.
        subject: What the question asks about.
    """
    return f"Question: {TOPICS[topic][0].format(subject)}\nAnswer:"


def general_knowledge() -> list[dict]:
    """Return all questions as rows of ``Completion``: ``prompt``, ``completion``, and all ``accepted`` answers."""
    rows = []
    for topic, (_, pairs) in TOPICS.items():
        for pair in pairs.split(", "):
            subject, _, answers = pair.partition(": ")
            accepted = answers.split("|")
            prompt = question(topic, subject)
            rows.append({"topic": topic, "prompt": prompt, "completion": f" {accepted[0]}", "accepted": accepted})
    return rows
