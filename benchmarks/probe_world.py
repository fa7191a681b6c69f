"""Facts of the wide knowledge probe, the world: topic -> (question with a gap, "subject: answer" pairs).

What stands after a slash is right as well, or nearly: it is never a wrong choice of that question.
"""

from __future__ import annotations

WORLD: dict[str, tuple[str, str]] = {
    "main_language": (
        "What is the main language of {}?",
        """
        Mexico: Spanish, Brazil: Portuguese, Austria: German, Iran: Persian, Iceland: Icelandic, the
        Czech Republic: Czech, Romania: Romanian, Bulgaria: Bulgarian, Croatia: Croatian, Albania:
        Albanian, Slovenia: Slovene, Slovakia: Slovak, Lithuania: Lithuanian, Latvia: Latvian, Estonia:
        Estonian, Saudi Arabia: Arabic, Indonesia: Indonesian, Cuba: Spanish, Armenia: Armenian,
        Bangladesh: Bengali, Nepal: Nepali, Cambodia: Khmer, Mongolia: Mongolian, Argentina: Spanish,
        Angola: Portuguese
        """,
    ),
    "currency": (
        "What is the currency of {}?",
        """
        Japan: the yen, China: the yuan, India: the rupee, the United Kingdom: the pound, the United
        States: the dollar, Russia: the ruble, Switzerland: the franc, Mexico: the peso, Brazil: the
        real, South Africa: the rand, Thailand: the baht, South Korea: the won, Poland: the zloty,
        Germany: the euro, Hungary: the forint, Israel: the shekel, Turkey: the lira, Vietnam: the dong,
        Denmark: the krone, Ukraine: the hryvnia, Nigeria: the naira, Kenya: the shilling, Ethiopia: the
        birr, Saudi Arabia: the riyal, Iraq: the dinar, Malaysia: the ringgit, Indonesia: the rupiah,
        Morocco: the dirham, France: the euro, Canada: the dollar, Pakistan: the rupee, Bangladesh: the
        taka
        """,
    ),
    "continent": (
        "On which continent is {}?",
        """
        Kenya: Africa, Nigeria: Africa, Ethiopia: Africa, Morocco: Africa, Ghana: Africa, Algeria:
        Africa, Zimbabwe: Africa, Brazil: South America, Argentina: South America, Peru: South America,
        Chile: South America, Bolivia: South America, Ecuador: South America, Canada: North America,
        Mexico: North America, Guatemala: North America, the United States: North America, China: Asia,
        India: Asia, Japan: Asia, Vietnam: Asia, Mongolia: Asia, Nepal: Asia, Iran: Asia, France:
        Europe, Poland: Europe, Sweden: Europe, Portugal: Europe, Romania: Europe, Ireland: Europe
        """,
    ),
    "city": (
        "In which country is the city of {}?",
        """
        Munich: Germany, Milan: Italy, Barcelona: Spain, Osaka: Japan, Shanghai: China, Mumbai: India,
        Toronto: Canada, Sydney: Australia, Rio de Janeiro: Brazil, Istanbul: Turkey, Marseille: France,
        Manchester: England / the United States, Chicago: the United States, Edinburgh: Scotland,
        Geneva: Switzerland, Salzburg: Austria, Krakow: Poland, Porto: Portugal, Rotterdam: the
        Netherlands, Antwerp: Belgium, Gothenburg: Sweden, Bergen: Norway, Cape Town: South Africa,
        Lagos: Nigeria, Casablanca: Morocco, Karachi: Pakistan, Busan: South Korea, Ho Chi Minh City:
        Vietnam, Auckland: New Zealand, Dubai: the United Arab Emirates, Saint Petersburg: Russia, Cork:
        Ireland
        """,
    ),
    "river": (
        "Which river flows through {}?",
        """
        London: the Thames, Paris: the Seine, Cairo: the Nile, Vienna: the Danube, Rome: the Tiber, New
        Orleans: the Mississippi, Cologne: the Rhine, Hamburg: the Elbe, Baghdad: the Tigris, Warsaw:
        the Vistula, Varanasi: the Ganges, Washington: the Potomac, Prague: the Vltava, Florence: the
        Arno, Lisbon: the Tagus, Seoul: the Han, Dublin: the Liffey, Seville: the Guadalquivir,
        Limerick: the Shannon, Kyiv: the Dnieper
        """,
    ),
    "state_capital": (
        "What is the capital of the US state of {}?",
        """
        California: Sacramento, Texas: Austin, Massachusetts: Boston, Georgia: Atlanta, Colorado:
        Denver, Arizona: Phoenix, Ohio: Columbus, Tennessee: Nashville, Indiana: Indianapolis, Hawaii:
        Honolulu, Utah: Salt Lake City, Alaska: Juneau, Florida: Tallahassee, Illinois: Springfield,
        Michigan: Lansing, Minnesota: Saint Paul, Virginia: Richmond, Louisiana: Baton Rouge, Oklahoma:
        Oklahoma City, Oregon: Salem, Nevada: Carson City, Montana: Helena, Maryland: Annapolis, Maine:
        Augusta, Wisconsin: Madison, Washington: Olympia
        """,
    ),
    "dish": (
        "From which country does {} come?",
        """
        sushi: Japan, pizza: Italy, the taco: Mexico, paella: Spain, kimchi: Korea, goulash: Hungary,
        haggis: Scotland, pho: Vietnam, moussaka: Greece / Turkey, the baguette: France, pierogi: Poland
        / Ukraine, poutine: Canada, pad thai: Thailand, jambalaya: the United States, tandoori chicken:
        India, borscht: Ukraine, the Wiener schnitzel: Austria, fish and chips: England, injera:
        Ethiopia, ceviche: Peru, bratwurst: Germany, dim sum: China, feijoada: Brazil, baklava: Turkey /
        Greece
        """,
    ),
    "record": (
        "What is {}?",
        """
        the highest mountain in the world: Mount Everest, the largest ocean: the Pacific Ocean, the
        largest animal: the blue whale, the tallest animal: the giraffe, the fastest land animal: the
        cheetah, the largest planet of the solar system: Jupiter, the planet nearest to the Sun:
        Mercury, the largest hot desert in the world: the Sahara, the largest country by area: Russia,
        the smallest country in the world: Vatican City, the largest continent: Asia, the largest bird:
        the ostrich, the hardest natural mineral: diamond, the star nearest to the Earth: the Sun, the
        longest river in South America: the Amazon, the longest river in Europe: the Volga, the largest
        island in the world: Greenland, the coldest continent: Antarctica, the largest land animal: the
        African elephant, the deepest lake in the world: Lake Baikal, the most abundant gas in the air:
        nitrogen, the lightest element: hydrogen, the longest bone of the body: the femur, the largest
        organ of the body: the skin, the shortest month: February, the longest day of the year in the
        north: the summer solstice
        """,
    ),
    "element_name": (
        "Which chemical element has the symbol {}?",
        """
        H: hydrogen, O: oxygen, C: carbon, N: nitrogen, He: helium, Na: sodium, K: potassium, Fe: iron,
        Au: gold, Ag: silver, Cu: copper, Pb: lead, Zn: zinc, Ca: calcium, Cl: chlorine, Mg: magnesium,
        Al: aluminium, S: sulfur, P: phosphorus, Sn: tin, Hg: mercury, Ne: neon, Li: lithium, Ni:
        nickel, U: uranium, Si: silicon, B: boron, F: fluorine, Ar: argon, Ti: titanium, Br: bromine, I:
        iodine, Pt: platinum, Ra: radium, As: arsenic, Co: cobalt
        """,
    ),
    "element_number": (
        "Which chemical element has the atomic number {}?",
        """
        1: hydrogen, 2: helium, 3: lithium, 4: beryllium, 5: boron, 6: carbon, 7: nitrogen, 8: oxygen,
        9: fluorine, 10: neon, 11: sodium, 12: magnesium, 13: aluminium, 14: silicon, 15: phosphorus,
        16: sulfur, 17: chlorine, 18: argon, 19: potassium, 20: calcium, 26: iron, 29: copper, 47:
        silver, 79: gold, 82: lead, 92: uranium
        """,
    ),
    "unit": (
        "What is the unit of {}?",
        """
        force: the newton, electric current: the ampere, electrical resistance: the ohm, frequency: the
        hertz, power: the watt, energy: the joule, pressure: the pascal, voltage: the volt, mass: the
        kilogram, length: the meter, time: the second, temperature: the kelvin, volume: the liter,
        loudness: the decibel, capacitance: the farad, electric charge: the coulomb, luminous intensity:
        the candela, amount of substance: the mole, radioactivity: the becquerel, the speed of ships:
        the knot, magnetic flux density: the tesla, the size of computer memory: the byte
        """,
    ),
    "count": (
        "How many {} are there?",
        """
        days in a week: seven, months in a year: twelve, hours in a day: twenty-four, minutes in an
        hour: sixty, legs on a spider: eight, legs on an insect: six, sides in a triangle: three, sides
        in a pentagon: five, wheels on a bicycle: two, cents in a dollar: one hundred, letters in the
        English alphabet: twenty-six, players in a football team: eleven, years in a decade: ten, years
        in a century: one hundred, planets in the solar system: eight, strings on a violin: four,
        fingers on one hand: five, eyes in a human face: two, centimeters in a meter: one hundred,
        seconds in a minute: sixty, seasons in a year: four, states in the United States: fifty, sides
        in a square: four, sides in a hexagon: six, inches in a foot: twelve, squares on a chessboard:
        sixty-four, cards in a standard deck: fifty-two, colors in the rainbow: seven
        """,
    ),
    "author": (
        "Who wrote {}?",
        """
        Hamlet: William Shakespeare, Pride and Prejudice: Jane Austen, Oliver Twist: Charles Dickens,
        War and Peace: Leo Tolstoy, Crime and Punishment: Fyodor Dostoevsky, The Adventures of
        Huckleberry Finn: Mark Twain, Moby-Dick: Herman Melville, Frankenstein: Mary Shelley, Dracula:
        Bram Stoker, The Odyssey: Homer, The Divine Comedy: Dante Alighieri, Don Quixote: Miguel de
        Cervantes, Nineteen Eighty-Four: George Orwell, The Lord of the Rings: J. R. R. Tolkien, the
        Harry Potter books: J. K. Rowling, The Great Gatsby: F. Scott Fitzgerald, The Old Man and the
        Sea: Ernest Hemingway, Les Misérables: Victor Hugo, The Time Machine: H. G. Wells, Twenty
        Thousand Leagues Under the Sea: Jules Verne, the Sherlock Holmes stories: Arthur Conan Doyle,
        Wuthering Heights: Emily Brontë, Jane Eyre: Charlotte Brontë, The Metamorphosis: Franz Kafka,
        The Picture of Dorian Gray: Oscar Wilde, Treasure Island: Robert Louis Stevenson, Faust: Johann
        Wolfgang von Goethe, Paradise Lost: John Milton
        """,
    ),
    "history_person": (
        "Who was {}?",
        """
        the first president of the United States: George Washington, the president of the United States
        in the Civil War: Abraham Lincoln, the French emperor who lost at Waterloo: Napoleon Bonaparte,
        the dictator of Nazi Germany: Adolf Hitler, the leader of nonviolent resistance in India:
        Mahatma Gandhi, the first person on the Moon: Neil Armstrong, the first human in space: Yuri
        Gagarin, the speaker of "I Have a Dream": Martin Luther King, the British prime minister in most
        of the Second World War: Winston Churchill, the leader of the Russian Revolution: Vladimir
        Lenin, the first black president of South Africa: Nelson Mandela, the explorer who reached the
        Americas in 1492: Christopher Columbus, the general who crossed the Alps with elephants:
        Hannibal, the Macedonian king who conquered Persia: Alexander the Great, the Roman dictator
        murdered on the Ides of March: Julius Caesar, the founder of the Mongol Empire: Genghis Khan,
        the author of the Ninety-five Theses: Martin Luther, the last queen of ancient Egypt: Cleopatra,
        the French heroine who was burned in 1431: Joan of Arc, the founder of modern nursing: Florence
        Nightingale, the teacher of Plato: Socrates, the queen of England at the time of the Spanish
        Armada: Elizabeth I, the first woman to fly alone across the Atlantic: Amelia Earhart
        """,
    ),
    "year": (
        "In which year {}?",
        """
        did the First World War begin: 1914, did the First World War end: 1918, did the Second World War
        begin: 1939, did the Second World War end: 1945, did Columbus reach the Americas: 1492, was the
        United States Declaration of Independence signed: 1776, did the French Revolution begin: 1789,
        did the first people land on the Moon: 1969, did the Berlin Wall fall: 1989, did the Titanic
        sink: 1912, was the Battle of Hastings: 1066, was Magna Carta sealed: 1215, was the Battle of
        Waterloo: 1815, was the Russian October Revolution: 1917, did the American Civil War begin:
        1861, was the Great Fire of London: 1666, did India become independent: 1947, was President
        Kennedy shot: 1963, did the stock market crash on Wall Street: 1929, did the Soviet Union break
        up: 1991
        """,
    ),
    "color": (
        "What color is {}?",
        """
        grass: green, the sky on a clear day: blue, snow: white, coal: black / gray, a ripe banana:
        yellow, blood: red, a pumpkin: orange, milk: white, a ripe lemon: yellow, chocolate: brown /
        white, an elephant: gray, a ripe strawberry: red, spinach: green, a flamingo: pink / red /
        orange, an emerald: green, a ruby: red, a sapphire: blue, a raven: black, a school bus in the
        United States: yellow, a fire engine: red, a polar bear: white, a carrot: orange, soot: black /
        gray, an eggplant: purple, a cucumber: green, roasted coffee: brown / black, lavender: purple /
        blue, cotton: white
        """,
    ),
    "material": (
        "What is {} made from?",
        """
        bread: flour / corn / milk / potatoes, cheese: milk, wine: grapes, paper: wood / cotton, glass:
        sand, a candle: wax / crude oil, a car tire: rubber / crude oil, chocolate: cocoa beans / milk,
        tofu: soybeans, leather: animal skin, honey: nectar, linen: flax, cider: apples, steel: iron,
        ketchup: tomatoes, French fries: potatoes, an omelet: eggs / milk, butter: milk, raisins:
        grapes, a sweater: wool / cotton, concrete: cement / sand, gasoline: crude oil, jeans: cotton,
        popcorn: corn, a brick: clay / sand / cement, yogurt: milk
        """,
    ),
    "science": (
        "What {}?",
        """
        is the chemical formula of water: H2O, is the chemical formula of table salt: NaCl, gas do
        plants take in from the air: carbon dioxide, gas do people need to breathe: oxygen, force pulls
        things to the ground: gravity, is frozen water called: ice, is water as a gas called: steam /
        vapor, do plants use to make food from light: photosynthesis, carries oxygen in the blood: red
        blood cells, is the center of an atom called: the nucleus, particle has a negative charge: the
        electron, instrument measures earthquakes: a seismograph, does a caterpillar turn into: a
        butterfly, do bees make: honey, is the natural satellite of the Earth: the Moon, pigment makes
        leaves green: chlorophyll, molecule carries our genes: DNA, is molten rock from a volcano
        called: lava, vitamin does sunlight help the skin to make: vitamin D, metal is liquid at room
        temperature: mercury, is a scientist's untested idea called: a hypothesis, layer protects the
        Earth from ultraviolet light: the ozone layer, causes the tides: the pull of the Moon / gravity
        / the Moon, is the boiling point of water at sea level: 100 degrees Celsius, is the freezing
        point of water: 0 degrees Celsius, is the powerhouse of the cell: the mitochondrion
        """,
    ),
    "myth": (
        "In Greek mythology, who {}?",
        """
        is the king of the gods: Zeus, is the god of the sea: Poseidon, is the god of the underworld:
        Hades, is the goddess of love: Aphrodite, is the goddess of wisdom: Athena, is the god of war:
        Ares, is the messenger of the gods: Hermes, is the god of wine: Dionysus, is the goddess of the
        hunt: Artemis, is the wife of Zeus: Hera, is the smith of the gods: Hephaestus, opened a
        forbidden box: Pandora, stole fire from the gods: Prometheus, carries the sky: Atlas, flew too
        near to the sun: Icarus, fell in love with his own reflection: Narcissus, turned people to stone
        with her eyes: Medusa, had twelve labors: Heracles, is the god of love with bow and arrows: Eros
        / Aphrodite, had only one weak heel: Achilles
        """,
    ),
    "sport": (
        "In which sport {}?",
        """
        do players throw a ball through a high hoop: basketball, do players hit home runs: baseball, do
        players score touchdowns: American football, do players hit a puck with a stick: ice hockey, do
        players hit a small ball into eighteen holes: golf, is there a butterfly stroke: swimming, do
        two people punch each other in a ring: boxing, do people ride horses over fences: show jumping,
        do people knock down ten pins: bowling, do people ride waves on a board: surfing, do players use
        a shuttlecock: badminton, is there a serve and a score called love: tennis / badminton, is there
        a wicket and a bowler: cricket, is there a goalkeeper and a penalty kick: soccer / ice hockey,
        do people shoot arrows: archery, do people use a sword called a foil: fencing, do people slide
        down snow on two boards: skiing, do people run 42 kilometers: the marathon, is there a scrum:
        rugby, do people row boats: rowing, do people wear a black belt: judo
        """,
    ),
    "place": (
        "Where do you go to {}?",
        """
        borrow a book: to a library / to a school, see a film: to a cinema, post a letter: to a post
        office, catch a train: to a railway station, catch a plane: to an airport, see wild animals in
        cages: to a zoo, buy medicine: to a pharmacy, pray on Sunday: to a church, swim indoors: to a
        swimming pool / to a gym / to a hotel, learn as a child: to a school, see old paintings: to a
        museum, put money in an account: to a bank, buy bread: to a bakery / to a gas station, have an
        operation: to a hospital, lift weights: to a gym, see a play: to a theater, sleep on a journey:
        to a hotel, eat a meal with waiters: to a restaurant / to a hotel, fill up the car: to a gas
        station, have your hair cut: to a hairdresser, report a crime: to a police station
        """,
    ),
}
