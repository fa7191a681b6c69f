"""Facts of the knowledge probe: topic -> (question with a gap, "subject: answer" pairs)."""

from __future__ import annotations

TOPICS: dict[str, tuple[str, str]] = {
    "capital": (
        "What is the capital of {}?",
        """
        France: Paris, Germany: Berlin, Italy: Rome, Spain: Madrid, Japan: Tokyo, China: Beijing,
        Russia: Moscow, Egypt: Cairo, Greece: Athens, Portugal: Lisbon, Austria: Vienna, Poland: Warsaw,
        Ireland: Dublin, Norway: Oslo, Sweden: Stockholm, Denmark: Copenhagen, Finland: Helsinki,
        Hungary: Budapest, Cuba: Havana, Peru: Lima, Argentina: Buenos Aires, Kenya: Nairobi, Thailand:
        Bangkok, India: New Delhi, Canada: Ottawa, Iraq: Baghdad, Iran: Tehran, South Korea: Seoul,
        Indonesia: Jakarta, the Netherlands: Amsterdam, Belgium: Brussels, Turkey: Ankara, Chile:
        Santiago, Colombia: Bogotá, Venezuela: Caracas, Ethiopia: Addis Ababa, Ukraine: Kyiv, Romania:
        Bucharest, Bulgaria: Sofia, Vietnam: Hanoi
        """,
    ),
    "symbol": (
        "What is the chemical symbol of {}?",
        """
        hydrogen: H, oxygen: O, carbon: C, nitrogen: N, helium: He, sodium: Na, potassium: K, iron: Fe,
        gold: Au, silver: Ag, copper: Cu, lead: Pb, zinc: Zn, calcium: Ca, chlorine: Cl, magnesium: Mg,
        aluminium: Al, sulfur: S, phosphorus: P, tin: Sn, mercury: Hg, neon: Ne, lithium: Li, nickel:
        Ni, uranium: U, silicon: Si
        """,
    ),
    "language": (
        "What language do people speak in {}?",
        """
        France: French, Germany: German, Italy: Italian, Spain: Spanish, Japan: Japanese, China:
        Chinese, Russia: Russian, Portugal: Portuguese, Greece: Greek, Poland: Polish, Sweden: Swedish,
        Norway: Norwegian, Turkey: Turkish, Hungary: Hungarian, Finland: Finnish, Korea: Korean, Egypt:
        Arabic, Denmark: Danish, Vietnam: Vietnamese, Thailand: Thai, Australia: English, the
        Netherlands: Dutch, Ukraine: Ukrainian
        """,
    ),
    "opposite": (
        "What is the opposite of {}?",
        """
        hot: cold, big: small, up: down, day: night, black: white, fast: slow, happy: sad, rich: poor,
        open: closed, old: young, light: dark, wet: dry, early: late, full: empty, high:
        low, strong: weak, long: short, left: right, true: false, good: bad, love: hate, begin: end,
        inside: outside, loud: quiet, clean: dirty, easy: difficult, war: peace, above: below, thick:
        thin, buy: sell, win: lose, first: last, alive: dead
        """,
    ),
    "animal_class": (
        "What kind of animal is {}?",
        """
        an eagle: a bird, a salmon: a fish, a snake: a reptile, an ant: an insect, a frog: an amphibian,
        a whale: a mammal, a penguin: a bird, a shark: a fish, a crocodile: a reptile, a butterfly: an
        insect, a toad: an amphibian, a dolphin: a mammal, an owl: a bird, a trout: a fish, a lizard: a
        reptile, a bee: an insect, a salamander: an amphibian, a bat: a mammal, a sparrow: a bird, a
        tuna: a fish, a turtle: a reptile, a beetle: an insect, an elephant: a mammal
        """,
    ),
    "home": (
        "Where does {} live?",
        """
        a bee: in a hive, a bird: in a nest, a fish: in water, a spider: in a web, a horse: in a stable,
        a bear: in a den, a camel: in the desert, a polar bear: in the Arctic, a penguin: in Antarctica,
        a kangaroo: in Australia, a panda: in China, a monkey: in the trees, an ant: in a colony
        """,
    ),
    "meaning": (
        'What does the word "{}" mean?',
        """
        enormous: very big, tiny: very small, rapid: very fast, ancient: very old, wealthy: very rich,
        furious: very angry, delighted: very happy, exhausted: very tired, filthy: very dirty,
        brilliant: very smart, freezing: very cold, starving: very hungry, hilarious: very funny,
        terrified: very afraid, silent: very quiet, gorgeous: very beautiful, boiling: very hot, soaked:
        very wet, simple: very easy, loyal: very faithful
        """,
    ),
    "profession": (
        "Who {}?",
        """
        teaches children at school: a teacher, treats sick people: a doctor, treats sick animals: a
        veterinarian, puts out fires: a firefighter, flies planes: a pilot, cuts hair: a barber, bakes
        bread: a baker, designs buildings: an architect, writes novels: an author, grows crops: a
        farmer, repairs cars: a mechanic, catches fish: a fisherman, defends people in court: a lawyer,
        cleans and fixes teeth: a dentist, paints pictures: an artist, studies stars: an astronomer,
        fixes pipes: a plumber, sells medicine: a pharmacist, makes furniture from wood: a carpenter,
        arrests criminals: a police officer, cooks in a restaurant: a chef
        """,
    ),
    "tool": (
        "What do you use to {}?",
        """
        cut paper: scissors, drive a nail: a hammer, write on paper: a pen, measure temperature: a
        thermometer, tell the time: a clock, see distant stars: a telescope, see tiny cells: a
        microscope, sweep the floor: a broom, dig a hole: a shovel, cut wood: a saw, open a lock: a key,
        brush your teeth: a toothbrush, find north: a compass, take photographs: a camera, keep food
        cold: a refrigerator, eat soup: a spoon, tighten a screw: a screwdriver, stay dry in the rain:
        an umbrella, boil water: a kettle, measure length: a ruler, light a dark room: a lamp, wash your
        hands: soap
        """,
    ),
    "field": (
        "What is the study of {} called?",
        """
        living things: biology, the stars and planets: astronomy, the past: history, the mind:
        psychology, rocks: geology, plants: botany, animals: zoology, numbers: mathematics, chemicals:
        chemistry, matter and energy: physics, the weather: meteorology, human societies: sociology,
        maps and places: geography, money and markets: economics, genes: genetics, insects: entomology,
        fossils: paleontology, language: linguistics, wisdom and knowledge: philosophy
        """,
    ),
    "organ": (
        "Which part of the body {}?",
        """
        pumps blood: the heart, thinks: the brain, breathes air: the lungs, sees: the eyes, hears: the
        ears, smells: the nose, tastes: the tongue, filters blood to make urine: the kidneys, digests
        food: the stomach, covers the body: the skin, moves the bones: the muscles, chews food: the
        teeth
        """,
    ),
    "invention": (
        "Who is famous for {}?",
        """
        the theory of relativity: Albert Einstein, the law of gravity: Isaac Newton, the light bulb:
        Thomas Edison, the telephone: Alexander Graham Bell, evolution by natural selection: Charles
        Darwin, the discovery of radium: Marie Curie, the discovery of penicillin: Alexander Fleming,
        painting the Mona Lisa: Leonardo da Vinci, the printing press: Johannes Gutenberg, dynamite:
        Alfred Nobel, the steam engine: James Watt, the first powered flight: the Wright brothers,
        painting Guernica: Pablo Picasso, painting Starry Night: Vincent van Gogh, the periodic table:
        Dmitri Mendeleev, the Ninth Symphony: Ludwig van Beethoven, psychoanalysis: Sigmund Freud, the
        pasteurization of milk: Louis Pasteur
        """,
    ),
    "landmark": (
        "In which country is {}?",
        """
        the Eiffel Tower: France, the Great Wall: China, the Taj Mahal: India, the Colosseum: Italy, Big
        Ben: the United Kingdom, the Statue of Liberty: the United States, Mount Fuji: Japan, the Great
        Pyramid of Giza: Egypt, Machu Picchu: Peru, the Kremlin: Russia, the Acropolis: Greece, the
        Sydney Opera House: Australia, the Brandenburg Gate: Germany, the Alhambra: Spain, Mount
        Kilimanjaro: Tanzania, Niagara Falls: Canada, Petra: Jordan, Angkor Wat: Cambodia
        """,
    ),
}
