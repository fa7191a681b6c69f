"""Word lists of the order task. The `UNSEEN_` lists never occur in a training row."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(" ".join(word.split()) for word in text.split(","))


NAMES = _words("""
    Anna, Ben, Carla, David, Elena, Frank, Grace, Hassan, Ingrid, Jamal, Karin, Liam, Maria, Nadia,
    Oscar, Paula, Quentin, Rosa, Samir, Tanya, Umar, Vera, Walter, Xavier, Yuki, Zoe, Amir, Bianca,
    Cedric, Diana, Emil, Farah, Gustav, Hannah, Ivan, Julia, Kofi, Lena, Marco, Nina, Omar, Priya,
    Rahul, Sofia, Tomas, Ursula, Viktor, Wendy, Aisha, Bruno, Chloe, Dmitri, Esther, Felix, Gloria,
    Hugo, Irene, Jonas, Kamala, Lucas, Mei, Noah, Olga, Pedro, Ruth, Stefan, Teresa, Vikram, Yusuf,
    Zainab, Arthur, Beatrice, Claire, Daniel, Edith, Fatima, George, Helen, Isabel, Jack, Kate, Leon,
    Monica, Nathan, Olivia, Peter, Rachel, Simon, Tara, Victor, Alice, Boris, Cynthia, Derek, Eva,
    Fiona, Gareth, Heidi, Igor, Jasmine, Kevin, Laura, Martin, Naomi, Patrick, Rita, Sven, Thomas, Anna
    Berg, Ben Carter, Carla Rossi, David Klein, Elena Popova, Frank Miller, Grace Okafor, Hassan Ali,
    Ingrid Larsen, Jamal Brown, Liam Murphy, Maria Santos, Nadia Haddad, Oscar Lind, Paula Costa, Rosa
    Diaz, Samir Patel, Tanya Novak, Walter Schmidt, Yuki Tanaka, Zoe Adams, Marco Bianchi, Priya Sharma,
    Tomas Horak, Chloe Martin, Hugo Laurent, Mei Chen, Noah Fischer, Olga Ivanova, Pedro Alves, Ruth
    Cohen, Kofi Mensah, Daniel Wright, Helen Park, Jack Taylor, Simon Weber, Laura King, Kevin Doyle,
    Eva Nilsson, Victor Hughes
""")

UNSEEN_NAMES = _words("""
    Adele, Bernard, Camille, Dennis, Emma, Fabian, Greta, Henrik, Ines, Joseph, Kirsten, Lorenzo,
    Miriam, Nils, Ophelia, Pablo, Roland, Sandra, Tobias, Vanessa, William, Yasmin, Agnes, Colin, Dora,
    Edgar, Florence, Gina, Adele Fontaine, Bernard Wolff, Emma Stone, Henrik Dahl, Joseph Kamau, Lorenzo
    Conti, Miriam Levy, Pablo Ruiz, Sandra Hill, Tobias Braun, William Scott, Yasmin Rahman, Colin Reid,
    Dora Nagy, Florence Price, Nils Holm
""")

ITEMS = _words("""
    apple pies, bagels, bananas, blueberry muffins, bread rolls, cheese sandwiches, cherry tarts,
    chicken wraps, chocolate cakes, cinnamon buns, coconut bars, croissants, cupcakes, doughnuts, egg
    sandwiches, fish cakes, fruit baskets, garlic breads, ginger cookies, ham sandwiches, honey jars,
    iced teas, jam jars, lemon cakes, lentil soups, mango smoothies, meatballs, mushroom pizzas, oat
    biscuits, olive loaves, orange juices, pancakes, pear tarts, plum cakes, potato salads, pumpkin
    pies, rice bowls, salmon fillets, spring rolls, tuna wraps, vegetable samosas, walnut cakes, water
    bottles, wedding cakes, yoghurt cups, boxes of tea, bags of flour, crates of oranges, jars of
    pickles, packs of coffee, bottles of milk, bags of rice, tins of tomatoes, bath towels, beach
    umbrellas, bed sheets, blue curtains, candles, ceramic bowls, coat hangers, cotton pillows, cutting
    boards, desk lamps, door mats, floor lamps, flower pots, folding chairs, garden hoses, glass vases,
    kitchen knives, laundry baskets, leather sofas, mirrors, napkins, oak tables, office chairs, paint
    brushes, picture frames, plastic boxes, rugs, shower curtains, silver spoons, sleeping bags, soup
    plates, steel shelves, storage boxes, tablecloths, tea cups, toasters, wall clocks, white plates,
    wine glasses, wooden stools, wool blankets, ballpoint pens, black markers, calendars, desk drawers,
    envelopes, erasers, file folders, green notebooks, ink cartridges, name badges, packs of paper,
    pencils, posters, printers, red binders, rulers, scissors, staplers, sticky notes, whiteboards,
    batteries, bike helmets, bike lights, cable ties, camera bags, drill bits, extension cords,
    headphones, keyboards, laptop bags, light bulbs, memory cards, microphones, monitors, paint rollers,
    phone cases, power banks, routers, safety goggles, screwdrivers, speakers, tablets, tool kits, USB
    cables, webcams, work gloves, wrenches, baseball caps, black jackets, cotton shirts, denim jeans,
    green scarves, hiking boots, leather belts, linen dresses, rain coats, red sweaters, running shoes,
    silk ties, sun hats, swimming trunks, white socks, winter coats, wool hats, basketballs, board
    games, chess sets, fishing rods, footballs, jigsaw puzzles, kites, playing cards, skateboards, table
    tennis bats, teddy bears, tennis balls, tents, toy trains, yoga mats, concert tickets, cinema
    tickets, museum passes, opera tickets, theatre tickets, zoo tickets, train tickets, ferry tickets,
    double rooms, single rooms, meeting rooms, tables by the window, parking spaces, rental bikes,
    rental cars, kayaks, guided tours, piano lessons, massage sessions, rose bushes, apple trees, bags
    of soil, herb plants, red tulips, sunflowers, white lilies, bouquets of roses, fern baskets, bags of
    cat food, bird cages, cat beds, dog leashes, fish tanks, hamster wheels
""")

UNSEEN_ITEMS = _words("""
    almond cakes, beef burgers, carrot cakes, fruit salads, lamb curries, peach pies, raisin scones,
    tomato soups, bottles of cider, bags of sugar, jars of olives, bread baskets, brass lamps, copper
    pans, garden benches, hand towels, paper lanterns, plant stands, round mirrors, salad bowls, velvet
    cushions, desk fans, gel pens, label printers, paper clips, blue folders, bike pumps, phone
    chargers, smoke alarms, tape measures, wall sockets, leather gloves, purple scarves, rain boots,
    silk shirts, straw hats, dart boards, rubber ducks, snow sledges, toy boats, ballet tickets, castle
    tours, family rooms, rowing boats, cooking lessons, palm trees, pots of basil, yellow roses, dog
    beds, parrot cages
""")

CITIES = _words("""
    Leeds, Lyon, Porto, Bergen, Graz, Ghent, Turin, Seville, Krakow, Brno, Aarhus, Tampere, Cork,
    Bristol, Dover, Boston, Denver, Austin, Toronto, Lima, Quito, Nairobi, Accra, Lagos, Cairo, Tunis,
    Mumbai, Pune, Dhaka, Hanoi, Osaka, Kyoto, Perth, Sydney, Hamburg, Bonn, Geneva, Basel, Malmo, Gdansk
""")

TIMES = _words("9am, 10 am, 11:30, noon, 2pm, 3 pm, 14:00, 4:30 pm, 5 o'clock, 18:15, 7pm, 8:45")
PRICES = _words("$4, $12.50, 3 euros, 7.20 euros, £5, £9.99, 15 dollars, €2, €8.50, $20")
WEEKDAYS = _words("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
MONTHS = _words("""
    January, February, March, April, May, June, July, August, September, October, November, December
""")
NUMBER_WORDS = dict(
    enumerate(_words("two, three, four, five, six, seven, eight, nine, ten, eleven, twelve"), start=2)
)
