"""Labels for collections of everyday photos, where none are given."""

_LABELS = """
person, group of people, crowd, portrait, child, baby, wedding, party, concert, football,
basketball, tennis, skiing, snowboarding, surfing, swimming, running, cycling, skateboarding,
climbing, hiking, camping, fishing, dancing, reading, cooking, dog, cat, horse, cow, sheep,
bird, duck, fish, insect, butterfly, bear, elephant, giraffe, zebra, monkey, snake, flower,
tree, forest, garden, leaf, mushroom, mountain, desert, beach, sea, lake, river, waterfall, sky,
sunset, snow, rain, fog, night, field, farm, road, street, bridge, city, skyline, building,
house, church, castle, tower, ruin, statue, painting, drawing, museum, shop, market, restaurant,
kitchen, bedroom, bathroom, living room, office, classroom, hospital, airport, station,
factory, car, truck, bus, train, tram, bicycle, motorcycle, boat, ship, aeroplane, helicopter,
food, cake, bread, fruit, vegetable, pizza, soup, coffee, wine, bottle, cup, book, newspaper,
document, screenshot, map, diagram, sign, computer, phone, camera, clock, lamp, chair, table,
bed, toy, game, instrument, guitar, piano, clothes, shoes, hat, bag, jewellery, tool, machine,
weapon, flag, fire, smoke, firework, swimming pool, playground, stadium, golf course, harbour,
parking lot, tennis court, aerial view
"""
EVERYDAY = tuple(" ".join(label.split()) for label in _LABELS.split(","))
"""About 170 things photos are often of, as labels for ``clipkit map``."""
