"""Facts of the wide knowledge probe, words: topic -> (question with a gap, "subject: answer" pairs).

What stands after a slash is right as well, or nearly: it is never a wrong choice of that question.
"""

from __future__ import annotations

WORDS: dict[str, tuple[str, str]] = {
    "synonym": (
        'Which word means the same as "{}"?',
        """
        large: big, begin: start, quick: fast, intelligent: smart, glad: happy, ill: sick, shout: yell,
        purchase: buy, error: mistake, gift: present, reply: answer, assist: help, automobile: car,
        stone: rock, street: road, unhappy: sad, frightened: scared, difficult: hard, conclude: end,
        construct: build, infant: baby, physician: doctor, wealthy: rich, odd: strange, choose: pick,
        vanish: disappear, brave: courageous, courteous: polite, weary: tired, permit: allow, silent:
        quiet, reside: live, attempt: try, journey: trip, repair: fix, connect: join, damage: harm,
        hurry: rush, leap: jump, speak: talk
        """,
    ),
    "antonym": (
        'Which word is the opposite of "{}"?',
        """
        generous: selfish, brave: cowardly, polite: rude, expensive: cheap, ancient: modern, guilty:
        innocent, arrive: depart / disappear, accept: refuse, remember: forget, victory: defeat /
        failure, success: failure / defeat, friend: enemy, sharp: blunt, deep: shallow, wide: narrow,
        heavy: light, soft: hard / rough, tight: loose, public: private, maximum: minimum / minor,
        increase: decrease, north: south, east: west, entrance: exit, question: answer, laugh: cry,
        push: pull, sunrise: sunset, teacher: student, optimist: pessimist, create: destroy, noisy:
        silent, awake: asleep, smooth: rough, borrow: lend, appear: disappear, permanent: temporary,
        natural: artificial, lazy: hardworking, major: minor / minimum, positive: negative, heaven:
        hell, husband: wife, always: never, ceiling: floor
        """,
    ),
    "past_tense": (
        'What is the past tense of the verb "{}"?',
        """
        go: went, eat: ate, see: saw, run: ran, write: wrote, buy: bought, bring: brought, think:
        thought, teach: taught, catch: caught, begin: began, drink: drank, sing: sang, swim: swam, give:
        gave, take: took, come: came, know: knew, grow: grew, fly: flew, break: broke, speak: spoke,
        choose: chose, drive: drove, sleep: slept, keep: kept, leave: left, lose: lost, make: made,
        tell: told, sell: sold, find: found, fall: fell, forget: forgot, hold: held, stand: stood, win:
        won, wear: wore, throw: threw, feel: felt
        """,
    ),
    "plural": (
        'What is the plural of "{}"?',
        """
        child: children, mouse: mice, foot: feet, tooth: teeth, man: men, woman: women, goose: geese,
        person: people, ox: oxen, leaf: leaves, wolf: wolves, knife: knives, wife: wives, half: halves,
        city: cities, baby: babies, box: boxes, church: churches, hero: heroes, potato: potatoes,
        tomato: tomatoes, sheep: sheep, crisis: crises, analysis: analyses, phenomenon: phenomena,
        bacterium: bacteria, thief: thieves, lady: ladies, bus: buses, dish: dishes
        """,
    ),
    "comparative": (
        'What is the comparative form of "{}"?',
        """
        good: better, bad: worse, big: bigger, happy: happier, far: farther, easy: easier, hot: hotter,
        little: less, many: more, thin: thinner, early: earlier, large: larger, busy: busier, fast:
        faster, strong: stronger, lucky: luckier, wet: wetter, noisy: noisier, nice: nicer, sad: sadder
        """,
    ),
    "female": (
        "What is the female counterpart of {}?",
        """
        a king: a queen, a prince: a princess, an actor: an actress, a waiter: a waitress, a bull: a
        cow, a rooster: a hen, a father: a mother, an uncle: an aunt, a nephew: a niece, a brother: a
        sister, a husband: a wife, a son: a daughter, a boy: a girl, a hero: a heroine, a stallion: a
        mare, a ram: a ewe, a duke: a duchess, an emperor: an empress, a god: a goddess, a host: a
        hostess, a monk: a nun, a bridegroom: a bride, a wizard: a witch, a lion: a lioness
        """,
    ),
    "young": (
        "What is {} called when it is young?",
        """
        a cat: a kitten, a dog: a puppy, a cow: a calf, a horse: a foal, a sheep: a lamb, a pig: a
        piglet, a goat: a kid, a hen: a chick, a duck: a duckling / a chick, a goose: a gosling / a
        chick, a swan: a cygnet / a chick, a bear: a cub, a deer: a fawn / a calf, a kangaroo: a joey, a
        frog: a tadpole, an owl: an owlet / a chick, an eagle: an eaglet / a chick, a hare: a leveret, a
        butterfly: a caterpillar, a lion: a cub, an elephant: a calf, a whale: a calf, a tiger: a cub, a
        turkey: a poult / a chick
        """,
    ),
    "animal_sound": (
        "Which sound does {} make?",
        """
        a dog: it barks / it howls, a cat: it meows / it hisses, a cow: it moos, a duck: it quacks, a
        lion: it roars, a sheep: it bleats, a snake: it hisses, a horse: it neighs, a pig: it oinks, a
        bee: it buzzes, a frog: it croaks, an owl: it hoots, a wolf: it howls / it barks, a rooster: it
        crows, a mouse: it squeaks, a donkey: it brays, a turkey: it gobbles, a small bird: it chirps, a
        crow: it caws / it crows, an elephant: it trumpets
        """,
    ),
    "kind": (
        "What kind of thing is {}?",
        """
        a rose: a flower / a color, an oak: a tree, a hammer: a tool / a weapon, a violin: a musical
        instrument, an apple: a fruit, a carrot: a vegetable, a diamond: a gemstone, iron: a metal / a
        tool, chess: a game / a sport, football: a sport / a game, a shirt: a piece of clothing, a car:
        a vehicle, a chair: a piece of furniture, red: a color, January: a month, Monday: a day of the
        week, winter: a season, French: a language, a dollar: a currency, a triangle: a shape / a
        musical instrument, an uncle: a relative, a daffodil: a flower, a banana: a fruit, a trumpet: a
        musical instrument, a ruby: a gemstone / a color, tennis: a sport / a game, a sofa: a piece of
        furniture, a truck: a vehicle, a jacket: a piece of clothing, copper: a metal / a color,
        spinach: a vegetable, purple: a color, a square: a shape, measles: a disease, oxygen: a gas, a
        rifle: a weapon, a cousin: a relative, Spanish: a language, a waltz: a dance, Buddhism: a
        religion
        """,
    ),
    "definition": (
        "What is {}?",
        """
        a widow: a woman whose husband has died, an orphan: a child whose parents have died, a library:
        a place where books are kept, a kitchen: a room for cooking, a hospital: a place for sick
        people, an island: land with water all around it, a desert: a very dry region, a century: one
        hundred years, a decade: ten years, a volcano: a mountain that can erupt, a museum: a place that
        shows art or old things, a cemetery: a place where the dead are buried, a bakery: a shop that
        sells bread, a nephew: the son of a brother or sister, a dictionary: a book that explains words,
        a map: a drawing of a region, a passport: a document for travelling abroad, a garage: a building
        for a car, an autobiography: the story of one's own life, a herbivore: an animal that eats
        plants, a carnivore: an animal that eats meat, a democracy: a government elected by the people,
        a monarchy: a state ruled by a king or queen, a vegetarian: a person who eats no meat, a
        drought: a long time without rain, a flood: water covering land that is usually dry, a bachelor:
        a man who is not married, an orchestra: a large group of musicians, a prison: a place where
        criminals are held, an atlas: a book of maps
        """,
    ),
    "adjective": (
        'What does it mean to be "{}"?',
        """
        fragile: easily broken, reluctant: not willing, transparent: easy to see through, edible: safe
        to eat, portable: easy to carry, punctual: always on time, anonymous: without a known name,
        bilingual: able to speak two languages, honest: telling the truth, jealous: wanting what someone
        else has, stubborn: not changing one's mind, annual: happening every year, visible: able to be
        seen, blind: not able to see, deaf: not able to hear, toxic: full of poison, contagious: easily
        passed to other people, flexible: easily bent, famous: known by many people, immortal: living
        forever, nocturnal: active at night, lonely: sad at being alone, unemployed: without a job,
        bald: without hair, obvious: easy to understand, grateful: thankful for something, curious:
        eager to learn, vacant: not occupied, illegal: against the law, extinct: no longer existing
        """,
    ),
    "proverb": (
        'How does the saying end that begins "{} ..."?',
        """
        Actions speak louder than: words, A picture is worth a thousand: words / stories, Better late
        than: never, An apple a day keeps the: doctor away, Practice makes: perfect, Birds of a feather:
        flock together, Two wrongs don't make a: right, When in Rome: do as the Romans do, The early
        bird catches: the worm, A penny saved is: a penny earned, Absence makes the heart: grow fonder,
        You can't judge a book by: its cover, Honesty is the best: policy, Don't put all your eggs in:
        one basket, All that glitters is: not gold, Every cloud has: a silver lining, Curiosity killed:
        the cat, Beggars can't be: choosers, Rome wasn't built in: a day, A bird in the hand is worth:
        two in the bush, Where there's smoke: there's fire, Look before you: leap, Where there's a will:
        there's a way, Time is: money, Many hands make: light work, Too many cooks spoil: the broth,
        Laughter is the best: medicine, The pen is mightier than: the sword, Out of sight: out of mind,
        A friend in need is: a friend indeed
        """,
    ),
    "abbreviation": (
        'What does "{}" stand for?',
        """
        USA: United States of America, UK: United Kingdom, UN: United Nations, EU: European Union, NASA:
        National Aeronautics and Space Administration, WHO: World Health Organization, DNA:
        deoxyribonucleic acid, FBI: Federal Bureau of Investigation, CIA: Central Intelligence Agency,
        ATM: automated teller machine, GPS: Global Positioning System, CPU: central processing unit,
        PDF: Portable Document Format, RAM: random-access memory, WWW: World Wide Web, NATO: North
        Atlantic Treaty Organization, CEO: chief executive officer, GDP: gross domestic product, USB:
        Universal Serial Bus, BBC: British Broadcasting Corporation, IMF: International Monetary Fund,
        HTML: HyperText Markup Language, AI: artificial intelligence, TV: television, UFO: unidentified
        flying object, HIV: human immunodeficiency virus, IQ: intelligence quotient, LED: light-emitting
        diode, URL: uniform resource locator, VIP: very important person, FAQ: frequently asked
        questions, DIY: do it yourself, ASAP: as soon as possible, PhD: Doctor of Philosophy
        """,
    ),
    "next": (
        "What comes right after {}?",
        """
        Monday: Tuesday, Tuesday: Wednesday, Wednesday: Thursday, Thursday: Friday, Friday: Saturday,
        Saturday: Sunday, Sunday: Monday, January: February, February: March, March: April, April: May,
        May: June, June: July, July: August, August: September, September: October, October: November,
        November: December, December: January, spring: summer, summer: autumn, autumn: winter, winter:
        spring, the letter A: the letter B, the letter F: the letter G, the letter P: the letter Q
        """,
    ),
    "demonym": (
        "What do you call a person from {}?",
        """
        Denmark: a Dane, Poland: a Pole, Finland: a Finn, Sweden: a Swede, Spain: a Spaniard, Scotland:
        a Scot, Turkey: a Turk, Greece: a Greek, Canada: a Canadian, Mexico: a Mexican, Norway: a
        Norwegian, Brazil: a Brazilian, Peru: a Peruvian, Egypt: an Egyptian, Iraq: an Iraqi, Israel: an
        Israeli, Iceland: an Icelander, New Zealand: a New Zealander, the Netherlands: a Dutchman,
        Ireland: an Irishman, France: a Frenchman, England: an Englishman, Cuba: a Cuban, Germany: a
        German, London: a Londoner / an Englishman, Pakistan: a Pakistani, Argentina: an Argentine,
        Portugal: a Portuguese
        """,
    ),
    "group": (
        "What is a group of {} called?",
        """
        wolves: a pack, lions: a pride / a pack, bees: a swarm / a colony, fish: a school / a swarm,
        sheep: a flock / a herd, cattle: a herd, ants: a colony / a swarm / an army, whales: a pod / a
        school / a herd, geese: a gaggle / a flock / a herd, crows: a murder / a flock, puppies: a
        litter / a pack, soldiers: an army / a team / a fleet, sailors on a ship: a crew / a team,
        actors: a cast, singers: a choir, ships: a fleet, students in a room: a class, football players:
        a team / a class, stars in space: a galaxy / a bunch, playing cards: a deck / a pack, flowers in
        a hand: a bouquet / a bunch / a cluster, grapes: a bunch / a cluster
        """,
    ),
    "person": (
        "What do you call a person who {}?",
        """
        writes poems: a poet, plays the piano: a pianist, takes photographs: a photographer, studies
        history: a historian, drives a taxi: a taxi driver, travels in space: an astronaut, steals: a
        thief, tells lies: a liar, translates what others say: an interpreter, plays the drums: a
        drummer, works in a mine: a miner, makes clothes: a tailor, sells flowers: a florist, carves
        statues: a sculptor, sells meat: a butcher, writes for a newspaper: a journalist, works with
        numbers and taxes: an accountant, leads an orchestra: a conductor, hunts animals: a hunter,
        rules an empire: an emperor, is new to something: a beginner, watches a sports match: a
        spectator, commands a ship: a captain, does magic tricks: a magician, judges in court: a judge,
        teaches at a university: a professor, looks after books: a librarian, helps at births: a
        midwife, works with electric wires: an electrician, guides tourists: a tour guide
        """,
    ),
}
