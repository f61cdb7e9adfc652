"""Write the prompt files of the tasks ocr, geneval and pickscore; assets/make_tiny.py writes tiny/.

    python prompts/make_prompts.py            rewrite every file named here, bit for bit the same
    python prompts/make_prompts.py --check    exit 1, naming each file that differs

ocr/{train,test}.txt         scenes with one quoted text of 1 to 5 words
geneval/train.jsonl          objects, counts, colors, positions, with the metadata the reward scores
pickscore/{train,test}.txt   descriptions of pictures of all kinds

geneval/test.jsonl is not written here, only checked: it is the benchmark's own file
prompts/evaluation_metadata.jsonl (github.com/djghosh13/geneval, MIT: geneval/LICENSE), 553 lines in
its order, so that scores compare with published ones.

Train and test are disjoint: no prompt in both; for ocr no quoted text in both (whatever its case);
for geneval no scene in both, however it is worded; for pickscore no subject in both. Nor does
ocr/train.txt hold a text that Flow-GRPO's ocr test file asks for (see FLOW_GRPO_TEST_TEXTS).
`check_properties` asserts this and the rest.

Word lists use two marks: `{a|b}` is a choice, `;` separates entries.
"""

import argparse
import hashlib
import itertools
import json
import random
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


# ---- Drawing: only Random.random(), whose sequence Python guarantees from version to version


def shuffled(rng, items):
    keys = [rng.random() for _ in items]
    return [items[i] for i in sorted(range(len(items)), key=lambda i: keys[i])]


def pick(rng, items):
    return items[int(rng.random() * len(items))]


def deal(rng, items):
    """Endless: every item once in random order, then again in another order, so that all are used
    evenly."""
    while True:
        yield from shuffled(rng, items)


def split(text, mark=";"):
    """The parts between the marks, wherever their lines were broken."""
    return [" ".join(part.split()) for part in text.split(mark) if part.strip()]


def choose(rng, text):
    """One reading of the choices {a|b} in a text."""
    return re.sub(r"\{([^}]*)\}", lambda m: pick(rng, m[1].split("|")), text)


def readings(text):
    """Every reading of the choices {a|b} in a text."""
    parts = [part.split("|") for part in re.split(r"[{}]", text)]
    return ["".join(reading) for reading in itertools.product(*parts)]


def sentence(text):
    return text[:1].upper() + text[1:]


# ---- geneval

CLASSES = split("""
person; bicycle; car; motorcycle; airplane; bus; train; truck; boat; traffic light; fire hydrant;
stop sign; parking meter; bench; bird; cat; dog; horse; sheep; cow; elephant; bear; zebra; giraffe;
backpack; umbrella; handbag; tie; suitcase; frisbee; skis; snowboard; sports ball; kite; baseball
bat; baseball glove; skateboard; surfboard; tennis racket; bottle; wine glass; cup; fork; knife;
spoon; bowl; banana; apple; sandwich; orange; broccoli; carrot; hot dog; pizza; donut; cake; chair;
couch; potted plant; bed; dining table; toilet; tv; laptop; computer mouse; tv remote; computer
keyboard; cell phone; microwave; oven; toaster; sink; refrigerator; book; clock; vase; scissors;
teddy bear; hair drier; toothbrush
""")
COLORS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
RELATIONS = ["left of", "right of", "above", "below"]
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS = {2: "two", 3: "three", 4: "four"}
MEASURES = {"scissors": "pair of", "skis": "pair of", "broccoli": "head of"}
# Countable here: the plural is the class name plus s or es, so that the prompt holds the name.
UNCOUNTABLE = ("person", "sheep", "skis", "knife", "broccoli", "computer mouse", "scissors")
COUNTABLE = [c for c in CLASSES if c not in UNCOUNTABLE]
# Paintable here: no people, and no fruit whose name is a color.
PAINTABLE = [c for c in CLASSES if c not in ("person", "orange")]

# The benchmark's own sizes, and the SHA-256 of its prompts, sorted, each with a line feed after it.
GENEVAL_TEST = dict(
    single_object=80, two_object=99, counting=80, colors=94, position=100, color_attr=100
)
GENEVAL_TEST_SHA256 = "ac4e5db774d347883eb8d56b945146e8ec297c3e1307bae68ed9065bc9dabdcd"
# Most of what SD3.5 draws worst, in the order of Flow-GRPO's paper, whose ratio is position 7,
# counting 5, color_attr 3, colors 1, two_object 1, single_object 0. No single object: the benchmark
# has all 80. Counting: of the 219 scenes (73 countable classes, 2 to 4 of each) the benchmark has
# 76, and the 143 left, each worded three ways, are all here.
GENEVAL_TRAIN = dict(two_object=260, counting=429, colors=219, position=972, color_attr=520)


def phrase(cls, color=""):
    """`a red car`, `an oven`, `a pair of blue skis`."""
    words = f"{MEASURES.get(cls, '')} {color} {cls}".split()
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def plural(cls):
    if cls.endswith(("s", "ch", "sh")):
        return cls + "es"
    return cls + "s"


def wanted(cls, count=1, **more):
    return {"class": cls, "count": count, **more}


def record(tag, include, words, **more):
    return {"tag": tag, "include": include, **more, "prompt": "a photo of " + words}


def counted(cls, count, manner="{}"):
    words = manner.format(f"{NUMBERS[count]} {plural(cls)}")
    return record("counting", [wanted(cls, count)], words, exclude=[wanted(cls, count + 1)])


def scene_of(entry):
    """What must be seen, whatever the wording: 'a left of b' is 'b right of a', 'a and b' is 'b and
    a'."""
    seen = [(one["class"], one["count"], one.get("color", "")) for one in entry["include"]]
    relation, _ = entry["include"][-1].get("position", ("", 0))
    if not relation:
        return entry["tag"], "", tuple(sorted(seen))
    if relation in ("right of", "below"):
        return entry["tag"], OPPOSITE[relation], tuple(reversed(seen))
    return entry["tag"], relation, tuple(seen)


def pairs(rng, classes):
    """Endless pairs of two classes, neither name inside the other (bear, teddy bear), every class
    used evenly."""
    first = deal(rng, classes)
    second = deal(rng, classes)
    while True:
        a = next(first)
        b = next(second)
        if a not in b and b not in a:
            yield a, b


def colors_records(rng):
    colors = deal(rng, COLORS)
    for cls in deal(rng, PAINTABLE):
        color = next(colors)
        yield record("colors", [wanted(cls, color=color)], phrase(cls, color))


def counting_records(rng):
    counts = deal(rng, list(NUMBERS))
    for cls in deal(rng, COUNTABLE):
        yield counted(cls, next(counts))


def two_object_records(rng):
    for a, b in pairs(rng, CLASSES):
        yield record("two_object", [wanted(a), wanted(b)], f"{phrase(a)} and {phrase(b)}")


def position_records(rng):
    """The second object listed is the one named first: 'a photo of SECOND left of FIRST'."""
    relations = deal(rng, RELATIONS)
    for a, b in pairs(rng, CLASSES):
        relation = next(relations)
        include = [wanted(a), wanted(b, position=[relation, 0])]
        yield record("position", include, f"{phrase(b)} {relation} {phrase(a)}")


def color_attr_records(rng):
    colors = deal(rng, COLORS)
    for a, b in pairs(rng, PAINTABLE):
        c = next(colors)
        d = next(colors)
        if c != d:
            include = [wanted(a, color=c), wanted(b, color=d)]
            yield record("color_attr", include, f"{phrase(a, c)} and {phrase(b, d)}")


# Each is endless and uses classes, colors, counts and relations evenly; the caller takes new ones.
RECORDS = {
    "two_object": two_object_records,
    "counting": counting_records,
    "colors": colors_records,
    "position": position_records,
    "color_attr": color_attr_records,
}


def benchmark():
    """The lines of GenEval's own prompt file."""
    return (HERE / "geneval/test.jsonl").read_text(encoding="ascii").splitlines()


def make_geneval(rng):
    """Train, from the scenes that the benchmark leaves. Counting has few, so each of its scenes is
    worded three ways."""
    taken = {scene_of(json.loads(line)) for line in benchmark()}
    entries = []
    for tag, size in GENEVAL_TRAIN.items():
        chosen = []
        for entry in RECORDS[tag](rng):
            if scene_of(entry) in taken:
                continue
            taken.add(scene_of(entry))
            if tag == "counting":
                found = entry["include"][0]
                manners = ["{}", "exactly {}", "{} side by side"]
                chosen += [counted(found["class"], found["count"], manner) for manner in manners]
            else:
                chosen.append(entry)
            if len(chosen) == size:
                break
        entries += chosen
    return [json.dumps(entry) for entry in shuffled(rng, entries)]


# ---- Words shared by ocr and pickscore

LIGHT = {
    "day": split("""
        in soft morning light; at golden hour; under a pale overcast sky; in bright midday sun; on a
        hazy morning; in the long shadows of late afternoon; just after a summer rain; in crisp
        autumn light; on a calm day
    """),
    "in": split("""
        in warm lamplight; in soft window light; under even studio lighting; in cool diffuse
        daylight; in dim amber light; in a beam of afternoon sun; in gentle early light; with deep
        soft shadows
    """),
    "night": split("""
        at dusk; on a rainy night; on a foggy evening; late at night; under a deep blue sky; just
        after sunset
    """),
    "space": split("""
        in cold starlight; in hard white sunlight; in the faint glow of a nebula; in deep shadow
    """),
    "-": [],
}


def entries_of(text):
    """An entry a line; an indented line continues the one before."""
    return text.strip().replace("\n    ", " ").split("\n")


def fields_of(text):
    """The fields of each entry, parted by the bars that are not inside {a|b}."""
    return [
        [field.strip() for field in re.split(r"\|(?![^{]*\})", entry)] for entry in entries_of(text)
    ]


def write_lines(rng, makers, n, words, seen):
    """n distinct lines, the makers in turn, each called until its line is new and has a number of
    words in range."""
    lines = []
    turn = deal(rng, makers)
    while len(lines) < n:
        make = next(turn)
        line = next(
            line for line in iter(make, None) if line not in seen and len(line.split()) in words
        )
        seen.add(line)
        lines.append(line)
    return lines


# ---- ocr

# Texts of the lists below that Flow-GRPO's ocr test file (github.com/yifan123/flow_grpo,
# dataset/ocr/test.txt) asks for too, case and spaces aside. They are left out, so that a model
# trained here can be scored on that file.
FLOW_GRPO_TEST_TEXTS = (
    "Open 24 Hours",
    "EAT HERE",
    "DANGER HIGH VOLTAGE",
    "HARD HAT AREA",
    "DO NOT TOUCH",
    "Low Battery",
    "3 New Messages",
    "GAME OVER",
    "INSERT COIN",
    "PRESS START",
    "FREE HUGS",
    "New Arrivals",
    "HANDLE WITH CARE",
    "Here Be Dragons",
    "Do Not Disturb",
)

# kind: texts of that kind
TEXTS = """
cafe: The {Copper Kettle|Sleepy Heron|Blue Teapot|Velvet Bean}; {Morning|Harbor|Little Fern} Cafe;
    {Bean & Leaf|Cup & Saucer|Milk & Honey}; Captain's Table; Cafe 1907; Daily Grind; Coffee Tea And
    Warm Hearts
bakery: {Golden Crust|Rye & Shine|Sugar Mill} Bakery; Baker's Dozen; Flour & Salt; Grandma's Oven;
    The Rolling Pin; Fresh Bread Daily; Crumbs; Pies & Pastries; Buns At 7; We Bake While You Sleep
books: {Paper Lantern|Second Chapter|Dusty Fox} Books; The {Quiet Page|Book Nook}; Ink & Owl; Rare
    Books & Maps; Used Books; Once Upon A Shelf; 1001 Stories; One More Chapter Before Bed
inn: The {Gilded Swan|Old Bell|Ivy Gate|Crooked Chimney|Silver Trout} Inn; Fox & Fiddle; The Drowsy
    Miller; Rooms To Let; Stag & Thistle; Seven Oaks Lodge; Warm Beds And Good Ale
diner: Starlight {Diner|Motel}; Comet {Lanes|Drive-In}; Open 24 Hours; The Late Plate; Velvet Room;
    Cactus Motel; EAT HERE; Vacancy; Hot Coffee; Dance Hall; Noodles; Karaoke; Best Pie In The
    County
road: SLOW DOWN; FALLING ROCKS; SHARP CURVE; ROAD WORK AHEAD; DEER CROSSING; DUCKS CROSSING; STEEP
    HILL; ONE LANE BRIDGE; DEAD END; LOOSE GRAVEL; MAX 30; KEEP LEFT; DETOUR; LOW BRIDGE; SCHOOL
    ZONE 20; CHECK BRAKES; NO THROUGH ROAD; NO SERVICES NEXT 60 MILES
street: {Juniper|Chestnut|Heron} Lane; {Orchard|Lantern} Street; Mill Hill; Harbor Row; Weaver's
    Alley; Old Mint Square; 12th Avenue; Station Road; Court Of The Seven Bells
town: Welcome To {Fernvale|Pine Hollow|Maple Bay|Stonebridge}; Willow Creek Farm; Otter Lake;
    Population 412; Campground; Drive Safely!; Come Again Soon!; Gateway To The Silver Lakes
warn: DANGER HIGH VOLTAGE; KEEP OUT; NO ENTRY; HARD HAT AREA; CAUTION; AUTHORIZED STAFF ONLY; DO NOT
    TOUCH; WATCH YOUR STEP; EAR PROTECTION REQUIRED; EMERGENCY EXIT; LOADING ZONE; ZONE 4; HARD HATS
    REQUIRED BEYOND HERE
park: Do Not Feed The Ducks; Leash Your Dog; No Fishing; Deep Water; Quiet Zone; Picnic Area; Nature
    Trail 2; Bird Sanctuary; No Campfires; Stay On The Path; Beware Of Geese!; Please Keep Off The
    Grass
title: The {Salt Road|Glass Orchard|Beekeeper's Almanac|Winter Atlas}; A Map Of Rain; Letters From
    Nowhere; Tales Of The Tide; The 13th Key; Small Brave Things; Ember & Ash; How Rivers Remember;
    The Owl's Secret; Hollow Moon; Seven Quiet Winters; The Lost Cartographer; Whispers; Kingdom Of
    Moss; The Girl Who Collected Storms; A Brief History Of Buttons
film: The Last Lighthouse; Midnight Over The Bay; Ghost Orchard; Return To Zero; Train 49; City Of
    Echoes; The Runaway Piano; Static; Silent Harbor; Love & Thunderstorms; Robot Holiday; Night
    Shift; Deep Blue Signal; The Night The Moon Fell; Nobody Leaves The Glass Island
event: {Summer Jazz|Open Mic|Salsa Dance} Night; Folk Fest 2025; Harvest Fair; Spring Parade; Kite
    Day; Book Fair; Rock The River; Lantern Festival; Street Food Sunday; Live Tonight!; Battle Of
    The Bands; Pancake Breakfast Saturday 9 AM
slogan: Stay Curious; Good Vibes Only; But First Coffee; Plant Lover; Born To Hike; World's Okayest
    Cook; Be Kind; Not Today; Less Is More; Hello Sunshine; I Paused My Game; Nope; Powered By Tea;
    Read More Books; Early Bird; Eat & Run; Easily Distracted By Small Dogs; Ask Me About My Garden
party: Happy Birthday; Happy 30th!; Best Wishes; You Are 6!; Hooray; Welcome Baby; Good Luck!; Sweet
    16; Bon Voyage; Happy New Year; Just Married; Let's Party!; Cheers To 50 Years; Happy
    Retirement; Happy Birthday To My Twin; Fifty Years And Still Dancing
card: Thank You; Get Well Soon; With Love; Season's Greetings; Miss You; Thinking Of You; You're
    Invited; Save The Date; Hugs; For My Sister; Congratulations; New Home!; Peace & Joy; Dear
    Grandpa; Wishing You A Quiet Week; Thank You For The Flowers
date: Built 1887; Est. 1912; 4 May 1931; Founded 1768; Restored In 1999; Anno 1642; Opened June
    1925; City Library 1903; Erected 1850; Town Hall; School House 1871; 21 March 1956; Given By The
    Town 1904
keepsake: Forever & Always; Come Home Soon; My Compass; To The Moon; Yours; Hope; Never Lost; Two
    Hearts; Since 2011; Still I Wander; Courage; Grow Old With Me; 12 August 1988; You Are My Safe
    Harbor
plate: KLM 482; SEA 204; BUG 4 FUN; OLD 1962; ROADTRIP; 7 WAVES; QRT 905; SLOW 1; ZOOM ZOOM; DX
    5510; GO WEST
jar: Fig Jam; Wild Honey; Plum Jam 2023; Pickled Beets; Sea Salt; Lemon Curd; Dried Mint; Coffee
    Beans; Grandpa's Chutney; Oats & Seeds; Star Anise; Batch 12; Best Before The First Frost
potion: Moon Dust; Dragon Tears; Sleep Tonic; Elixir No. 9; Bottled Storm; Truth Drops; Frog Breath;
    Starlight; Invisible Ink; Essence Of Fog; Troll's Remedy; Do Not Drink After Midnight
chalk: Welcome Back!; Math Test Friday; Read Chapter 5; Today Is Monday; No Homework!; Spelling Bee;
    Science Fair; The Water Cycle; Open Your Books; Class 3A; History; The Solar System; Please
    Bring Your Gym Shoes
menu: Soup Of The Day; Fresh Waffles; Hot Chocolate; Two For One Tuesday; Pie & Coffee; Brunch Until
    2; Homemade Lemonade; Breakfast All Day; Pancakes!; Today's Catch; Cold Brew; Vegan Chili; Kids
    Eat Free On Mondays
note: Buy Milk; Call Back; Don't Forget Keys; Back By Noon; Dentist At 3; Water The Plants; You Got
    This!; Feed The Cat; Smile; Pay Rent; Meeting 10 AM; Drink Water; Ask For Help; Gone Fishing
    Back At 5
screen: Low Battery; Update Complete; 3 New Messages; No Signal; Loading; Enter Password; Alarm
    6:30; Try Again; File Not Found; Saved!; Hello World; System Ready; Call Ended; Your Download
    Will Start Soon
game: GAME OVER; LEVEL 7; INSERT COIN; HIGH SCORE 9800; PRESS START; BONUS ROUND; NEW RECORD; PLAYER
    2 WINS; STAGE CLEAR; EXTRA LIFE; READY GO!; CREDITS 2; COLLECT ALL THE GOLDEN KEYS
boat: Sea Sparrow; Morning Tide; The Wandering Gull; Salty Dog; Northern Light; Second Wind; Lucky
    7; Mermaid's Song; Wind In My Old Sails
craft: AURORA 7; STAR WANDERER; DEEP FIELD 3; ODDITY; LONG WAY HOME; ORBIT ONE; CREW ONLY; NOVA 5;
    AIR LOCK; NEXT STOP RINGS OF SATURN
robot: UNIT 12; Hello Human; PROTOTYPE X9; HELPER 3; GARDEN BOT; TYPE B; I Make Toast; MODEL 88;
    FREE HUGS; BEEP!; ASK ME TO WATER PLANTS
mural: Dream Bigger; Love This City; Create; Rise Up; Color Outside The Lines; Unity; No Limits;
    Breathe Deep; Street Poets; Wild At Heart; Never Stop Playing; We Are One; Plant Seeds Where You
    Stand
door: SALE; Half Price; Closing Down Sale; Open Late; Back In 5 Minutes; Sorry We're Closed; Now
    Hiring; New Arrivals; Cash Only; Grand Opening!; Everything Must Go; Buy 2 Get 1; Moving Soon;
    Please Ring The Bell Twice
crate: FRAGILE; HANDLE WITH CARE; THIS SIDE UP; KEEP DRY; PROPERTY OF MUSEUM; BOX 18 OF 20; TOP
    SECRET; KITCHEN STUFF; EXPEDITION 1911; DO NOT STACK; BOOKS & RECORDS; OPEN THIS END WITH CARE
news: Storm Is Coming; Local Team Wins!; Bridge Reopens Today; Comet Seen Again; Snow Stops Trains;
    Mystery Solved; Giant Pumpkin Wins; Whale In Harbor; Lost Cat Found; Record Heat; Library
    Saved!; Town Clock Runs Backwards Again
map: Whale Bay; Here Be Dragons; Hidden Harbor; Cape Sorrow; Lost Lagoon; North Sea; Isle Of Mist;
    The Long River; Beyond This Point Lie Monsters
truck: Taco Sunrise; Noodle Wagon; Waffle Station; The Rolling Grill; Frosty's Ice Cream; Dumpling
    Express; Big Cone; Curry In A Hurry; Pizza & Peace; Churros; Soup Troop; Hot Buns And Cold
    Lemonade
market: Fresh Eggs; Ripe Peaches; Local Honey; 3 For 5; Organic; Today's Berries; Sweet Corn; Wild
    Mushrooms; Three Melons For Two Coins
library: Quiet Please; Silence; Poetry Section; Reading Room 2; Staff Picks; Local History; New
    Books; Lost & Found; Fiction A To M; Children's Corner; Do Not Disturb; Return Books To This
    Desk
cause: Save The Bees; Plant More Trees; Clean Our River; Bike To Work; Protect The Reef; Art For
    All; Reuse & Repair; Libraries Matter; There's No Planet B; Music In Schools; Give The River
    Room Again
"""

# kind | what carries the text | how the text is made | where | light
SCENES = """
cafe | a {wooden|slate|green enamel} sign above the door of a {small|corner} cafe | painted in
    {cream|gold|pale blue} script | on a cobbled street; in a narrow old-town lane; beside a quiet
    canal | day
cafe | a {striped|dark green|burgundy} awning over a busy cafe terrace | printed in {white|pale
    yellow} capitals | on a tree-lined boulevard; across from a fountain; beside a market square |
    day
bakery | a {curved|tall} bakery window full of {crusty loaves|golden croissants|fruit tarts} |
    painted in {gold|white} letters | on a village high street; opposite a stone church; on a busy
    corner | day
books | a {carved oak|cast-iron|hanging wooden} bookshop sign | painted in {faded gold|ivory} serif
    letters | over a crooked doorway; above a cart of secondhand novels; in a narrow arcade | day
inn | a swinging {iron-framed|weathered wooden} inn sign | painted in {gilded|crimson} old-style
    letters | beside a country road; in front of a thatched roof; above a courtyard gate | day
diner | a glowing {pink|turquoise|amber|red} neon sign | bent from {slim|bright} glass tubing | on
    the side of a brick building; above a row of parked cars; over a narrow doorway | night
road | a {yellow diamond-shaped|square orange} road sign | printed in bold black capitals | beside a
    winding mountain road; at the edge of a desert highway; along a forest road; by a country lane |
    day
street | a {blue|white} enamel street sign | printed in {neat|slightly worn} capitals | on a brick
    wall; on the corner of a limestone building; on a post beside climbing roses | day
town | a large {wooden|stone} roadside sign | carved in {rounded|deep white} letters | at the edge
    of a small town; between two tall pines; in front of rolling green hills | day
warn | a {red|yellow} metal warning sign | stenciled in black capitals | on a chain-link fence;
    beside a stack of steel pipes; at the gate of a construction site | day
park | a small wooden notice on a post | painted in {white|dark green} letters | at the edge of a
    pond; beside a gravel path; in a leafy city park; among tall grass | day
title | a {cloth-bound|leather-bound|well-worn} book {with a ribbon bookmark|with frayed corners} |
    stamped in {gold|silver|copper} foil | on an oak desk; beside a cup of tea; on a stack of old
    novels | in
title | a hardcover novel with a cover painting of {misty mountains|a ship at sea|a walled garden|a
    lone tower} | set in {large ornate|elegant white|tall slender} letters | in a bookshop window;
    on a bedside table | in
film | a {vintage|minimalist|retro} movie poster showing {a lone figure on a hill|a stormy sea|a
    city skyline} | printed in {huge red|slanted yellow|pale blue} letters | in a cinema lobby; on a
    subway wall; in a long hallway | in
film | a glowing theater marquee | spelled out in black plastic letters | above a red-carpeted
    entrance; on a busy downtown avenue; over a small box office | night
event | a {screen-printed|torn|brightly colored} poster | printed in {chunky orange|bold blue|curly
    purple} type | on a brick wall; on a lamp post; in a music shop window; on a wooden fence | day
event | a long cloth banner | painted in {red|multicolored|dark blue} letters | across a village
    main street; above an outdoor stage; between two market stalls | day
slogan | a {plain white|navy|mustard yellow} cotton t-shirt | printed in {bold block|loopy
    handwritten} letters | on a wooden hanger; on a tidy shelf; on a shop mannequin | in
slogan | a {speckled|white|sky blue} ceramic mug | glazed in {dark brown|cobalt blue} lettering | on
    a windowsill; beside a keyboard; on a rustic wooden table | in
party | a {chocolate|lemon|three-tier vanilla} cake {topped with berries|with lit candles|with
    pastel sprinkles} | piped in {pink|pale blue|bright red} icing | on a glass cake stand; on a
    party table; in a bakery display case | in
party | a {gold|silver|pastel} paper garland | cut out in {glittery|cheerful} letters | above a
    dessert table; over a fireplace; between clusters of balloons | in
card | a folded greeting card with {pressed flowers|a watercolor wreath|a gold border} | written in
    {flowing|delicate} calligraphy | beside a fountain pen; on a linen tablecloth; next to a cream
    envelope | in
date | a {bronze|weathered brass} plaque | cast in raised letters | on an old stone wall; beside a
    carved doorway | day
keepsake | a {silver locket|gold pocket watch|brass compass|plain silver ring} | engraved in fine
    italic letters | on dark velvet; on a stack of old letters; in an open wooden box | in
plate | a license plate on a {mint green|cherry red|cream} vintage {car|van} | embossed in {dark
    blue|black} characters | on a coastal road; under palm trees; in front of a country garage | day
jar | a {glass|stoneware} jar with a {paper|linen} label | written in {neat|looping} brown ink | on
    a pantry shelf; in a farmhouse kitchen; beside a wooden spoon | in
potion | a dusty {round|tall|emerald green} potion bottle with a {peeling|stained} label | written
    in {spidery|curling} script | in a wizard's cluttered study; on an apothecary shelf; beside
    bubbling flasks | in
chalk | a {green|black} classroom chalkboard | written in {white|yellow and white} chalk | behind a
    teacher's desk; above a tray of colored chalk; in an old schoolroom | in
menu | a {folding|framed} chalkboard sign | written in {colorful|curly white} chalk letters |
    outside a bistro; beside a row of bicycles; on a sunny sidewalk | day
note | a {yellow|pink|pale green} sticky note | scribbled in {blue|black} marker | on a refrigerator
    door; on a bathroom mirror; on the edge of a monitor | in
screen | a {smartphone|tablet|laptop} screen | shown in {clean white|bold green|large grey} letters
    | on a cluttered desk; on a cafe table; in a dark bedroom | in
game | a retro arcade cabinet screen | shown in {chunky|blinking} pixel letters | in a dim game
    hall; in a basement den; between two pinball machines | in
boat | a {blue|dark green|faded red} wooden fishing boat | painted along the bow in {white|gold}
    letters | in a calm harbor; on a pebble beach; beside a stone pier | day
craft | a {sleek silver|battered|white} spaceship | stenciled along the hull in {black|orange} block
    letters | above a ringed planet; over a cratered moon; among drifting ice | space
robot | a {friendly|rusty|towering} robot with a metal chest plate | stenciled in {square|rounded}
    letters | in a cluttered workshop; on a futuristic street; among wildflowers | day
mural | a huge graffiti mural | sprayed in {purple and orange|electric blue|hot pink} bubble letters
    | on a concrete underpass; along a schoolyard wall; on the side of a warehouse | day
door | a {red|white|bright yellow} sign in a shop window | printed in {big|bold} letters | beside
    two mannequins; above a bicycle rack; on a busy shopping street | day
crate | a {cardboard box|wooden crate} {tied with rope|with dented corners} | stenciled in
    {black|dark red} ink | in a dusty attic; on a warehouse shelf; in the back of a truck | in
news | a folded newspaper | printed in heavy black headline type | on a breakfast table; under a
    pair of glasses | in
map | an {old parchment|ink-stained} map {with a compass rose|with curled edges} | inked in
    {brown|faded red} old-style letters | on a captain's desk; under a brass lantern; beside a
    sextant | in
truck | a {turquoise|bright orange|polished steel} food truck | painted in {swirling|big rounded}
    letters | in a city park; at a music festival; by the waterfront | day
market | a {wooden board|cardboard sign} at a busy produce stall | painted in {green|red} brush
    letters | in an open-air market; under a canvas roof; beside a stack of baskets | day
library | a {small brass|framed paper|wooden} sign | printed in {tidy black|old-fashioned} letters |
    on a library desk; on a frosted glass door; beside tall bookshelves | in
cause | a {cardboard placard|painted bedsheet banner} | brushed in {thick green|bright red|bold
    blue} letters | above a cheerful street march; in front of city hall; between two smiling
    students | day
"""

MEDIUM = split("""
a close-up photograph; a sharp, detailed photograph; a grainy film photograph; a crisp documentary
photo; a cinematic still; a photorealistic image; a realistic photo; a loose watercolor painting; a
detailed oil painting; a soft pencil drawing; a clean digital illustration; a storybook
illustration; a realistic 3D render; a wide-angle photo
""")
FINISH = split("""
shallow depth of field; fine film grain; cinematic composition; loose watercolor style; high detail;
sharp focus; muted colors; storybook illustration style; documentary photo style; rich saturated
colors; oil painting style; minimalist composition; photorealistic; realistic textures; digital
illustration with clean lines
""")
# T the quoted text, W "word", "words" or "text", O what carries it, H how it is made, P where,
# L light, M medium, F finish
FRAMES = split("""
{T} is {H} on {O} {P}, {L}, {F}. ; {T}, {H} on {O} {P}, {L}, {F}. ; {T}: {M} of {O} {P}, the text
{H}, {L}. ; The {W} {T}, {H} on {O} {P}, {L}, {F}. ; {M} of {O} with the {W} {T} {H}, {P}, {L}. ;
{P}, {O} reads {T}, {H}, {L}, {F}. ; {L}, {O} {P} bears the {W} {T}, {H}, {F}. ; {M} of {O} that
says {T}, {P}, {L}. ; {P}, {L}, {O} says {T}. ; {M} of {O} {P}, {L}, with one clear line of text
{H}: {T}. ; {L}, {O} {P} carries the {W} {T}. ; {M}: {O} {P}, {L}, the text {H} and reading {T}.
""")


def ocr_texts(rng, held_out=0.18):
    """{kind: texts} for train and for test."""
    train = {}
    test = {}
    for entry in entries_of(TEXTS):
        kind, _, texts = entry.partition(":")
        texts = [reading for text in split(texts) for reading in readings(text)]
        texts = shuffled(rng, [text for text in texts if text not in FLOW_GRPO_TEST_TEXTS])
        cut = max(1, round(held_out * len(texts)))
        train[kind] = texts[cut:]
        test[kind] = texts[:cut]
    return train, test


def ocr_maker(rng, scene, texts, frames):
    """A function that returns a new sentence about this scene at each call."""
    carrier, manner, places, light = scene

    def make():
        text = next(texts)
        if re.search(r"\d", text):
            count = "text"
        elif " " in text:
            count = "words"
        else:
            count = "word"
        parts = dict(
            O=choose(rng, carrier),
            H=choose(rng, manner),
            P=pick(rng, split(places)),
            W=count,
            T="\0",
            L=pick(rng, LIGHT[light]),
            M=pick(rng, MEDIUM),
            F=pick(rng, FINISH),
        )
        return sentence(next(frames).format(**parts)).replace("\0", f'"{text}"')

    return make


def make_ocr(rng, sizes=(1100, 200)):
    seen = set()
    files = []
    for kinds, size in zip(ocr_texts(rng), sizes, strict=True):
        pools = {kind: deal(rng, texts) for kind, texts in kinds.items()}
        frames = deal(rng, FRAMES)
        makers = [ocr_maker(rng, scene, pools[kind], frames) for kind, *scene in fields_of(SCENES)]
        files.append(write_lines(rng, makers, size, range(10, 41), seen))
    return files


# ---- pickscore

# styles | subject | details | light
PICTURES = """
photo paint | {an elderly fisherman with a silver beard|a young violinist|a freckled gardener|a
    smiling baker dusted with flour|a retired lighthouse keeper|a mountain guide with windburned
    cheeks|a thoughtful poet} {in a thick wool sweater|in a linen shirt|wearing a wide-brimmed
    hat|wrapped in a patterned scarf} | close-up portrait; half-length portrait against a plain grey
    wall; profile view beside a window; calm expression and kind eyes | in
photo paint | {a glacial lake|a winding river|a wide green valley|a narrow waterfall|a high alpine
    meadow} {below jagged snowy peaks|between steep granite cliffs|under drifting clouds|framed by
    tall pines} | a tiny red cabin in the distance; wildflowers in the foreground; mirror-like
    reflections; sweeping panoramic view | day
photo paint | {a white lighthouse|a wooden pier|a row of fishing huts|a sandy cove|a tidal island}
    {on a rugged coast|battered by rolling waves|beside calm turquoise water|under a huge sky with
    gulls} | silky blurred water; seen from a hill; strong leading lines; sea spray in the air | day
photo paint digital | {a mossy footpath|an old stone bridge|a clear stream|a fallen tree covered in
    ferns|a small clearing} {in a beech forest|in a redwood grove|in a bamboo forest|in a pine wood}
    | shafts of light between the trunks; mushrooms along the edge; low fog near the ground; lush
    and peaceful | day
photo | {a red fox|a young elephant|a leopard|a brown bear|a mountain goat|a stag} {resting on a
    rock|looking straight at the camera|walking through tall grass|standing beside a river|half
    hidden by leaves} | wildlife photography; telephoto close-up; every hair in sharp detail; creamy
    blurred background | day
photo paint 3d | {a fluffy orange kitten|a sleepy corgi|a golden retriever puppy|a lop-eared
    rabbit|a tabby cat|a tiny hedgehog|a scruffy terrier} {curled up in a knitted blanket|sitting
    inside a cardboard box|peeking out of a wicker basket|wearing a small yellow raincoat|asleep on
    a stack of books} | very soft fur; cozy living room; pastel background; adorable and playful |
    in
photo | {a monarch butterfly|a dragonfly|a ladybug|a bumblebee|a green tree frog|a small snail} {on
    a dewy flower|on a mossy twig|on a curled leaf|on a blade of grass|on a lavender stem} | macro
    photograph; tiny water droplets; extremely fine detail; smooth green background | day
photo paint | {a kingfisher|a robin|a barn owl|a grey heron|a blue jay|a puffin} {on a bare
    branch|with its wings spread wide|in gently falling snow|on a weathered post|against a pale sky}
    | every feather visible; simple composition; soft blurred background; alert and elegant | -
photo digital | {a sea turtle|a school of silver fish|a giant manta ray|a humpback whale and her
    calf|an octopus|a cloud of jellyfish} {gliding over a coral reef|in deep blue water|above a
    sunken ship|beneath a shimmering surface} | sunbeams from above; seen from below; vivid corals;
    a diver far in the distance | -
photo 3d | {a glass perfume bottle|a matte black wristwatch|a pair of white sneakers|a ceramic
    teapot|a wooden desk lamp|a set of wireless headphones|a leather backpack} {on a marble
    pedestal|on a block of rough stone|floating above a pastel backdrop|among dry grass and pebbles}
    | product shot; soft gradient background; crisp reflections | in
photo | {a bowl of ramen with a soft egg|a rustic vegetable tart|a stack of blueberry pancakes|a
    wood-fired pizza with basil|a plate of roasted salmon|a colorful grain salad|a pot of creamy
    mushroom soup} {on a dark wooden table|on a blue ceramic plate|on a linen napkin|beside a jar of
    fresh herbs} | overhead food photography; steam rising; scattered herbs and crumbs; appetizing
    close-up | in
photo 3d | {a concrete house|a spiral library|a timber pavilion|a glass museum|a curved bridge|a
    tiny cabin on stilts} {overlooking a quiet lake|set into a hillside|in the middle of a pine
    forest|above a rocky shoreline|surrounded by reeds} | quiet modern design; clean geometric
    lines; large windows; one person for scale | day
photo digital 3d | {a reading nook|a plant-filled living room|a cozy attic bedroom|a potter's
    studio|a farmhouse kitchen|a small home office} {with a round window|with exposed wooden
    beams|with terracotta tiles|with mismatched vintage furniture} | a cat asleep on the rug; books
    everywhere; earthy colors; interior design magazine | in
digital 3d | {a crowded night market|an elevated train line|a noodle stall|a lone courier on a
    hoverbike|a rooftop garden|a giant holographic koi} {in a neon-lit future city|between towering
    skyscrapers|under a web of glowing cables|in a rain-soaked alley} | reflections in puddles; teal
    and magenta palette; cinematic wide shot | -
digital 3d | {a sleek explorer ship|a ring-shaped space station|a cargo shuttle|a vast solar sail}
    {orbiting a gas giant|in front of a glowing nebula|drifting past a broken moon|high above an icy
    planet} | epic sense of scale; hard science fiction; distant starlight; retro-futuristic design
    | -
digital paint | {a castle|a floating island|a hidden monastery|a ruined temple|a wizard's tower|an
    abandoned observatory} {above a sea of clouds|overgrown with glowing flowers|beside a great
    waterfall|above a mirror-still lake|in a valley of giant trees} | tiny travelers on the path;
    magical atmosphere; birds circling | day
digital paint 3d | {a young dragon|a forest spirit with antlers|a giant stone golem|a fox with a
    star-filled tail|a phoenix|a winged horse|a moss-covered turtle carrying a village} {resting in
    a meadow|drinking from a moonlit pool|curled around an old tree|watching over a quiet valley} |
    gentle and friendly; glowing particles in the air; richly detailed textures; fairy-tale mood | -
digital paint | {a wandering druid|an elven cartographer|a cheerful alchemist|a royal astronomer|a
    desert nomad|a clockwork inventor|a traveling bard} {with a tame raven|holding a brass
    lantern|surrounded by floating books|in an embroidered cloak|with a heavy leather satchel} |
    full-body character design; fantasy portrait; ornate costume details; expressive face | -
paint photo | {pears and figs|peonies and eucalyptus|lemons and blood oranges|chestnuts and
    rosemary|seashells and dried coral|garlic, bread and olives} {in a wooden bowl|on a crumpled
    linen cloth|on a stone windowsill|beside a glass vase} | classical still life; dark background;
    dramatic side light; rich textures | -
digital paint | {flowing ribbons of color|overlapping circles and arcs|a spiral of tiny
    triangles|dripping layers of pigment|a maze of thin golden lines|soft melting gradients} {in
    teal, coral and cream|in indigo and gold|in black and white|in warm earth tones|in candy
    pastels} | abstract composition; strong sense of rhythm; lots of empty space; textured surface |
    -
3d digital | {a round little robot|a penguin explorer|a raccoon chef|a mushroom with a face|a sleepy
    cloud|a small yeti|a bear astronaut} {waving hello|holding a red balloon|riding a
    tricycle|watering a sunflower|eating a huge donut|reading a map} | cute character design; big
    shiny eyes; soft rounded shapes; cheerful colors | -
photo paint digital | {a vintage convertible|a yellow camper van|a mint green scooter|an old red
    tractor|a little postal van|a classic motorcycle} {on a coastal road|crossing a golden
    plain|beneath snow-capped mountains|beside a sunflower field|parked by a quiet harbor} | low
    angle; chrome details; nostalgic mood | day
paint digital photo | {a snowy village square|a harvest festival|a lantern parade|a winter fair with
    a carousel|a street of wooden stalls|a frozen pond with skaters} {seen from a church tower|at
    the foot of the mountains|beside a candlelit chapel|full of happy families} | strings of warm
    lights; children and playful dogs; festive mood | -
"""

# style: openings, endings
STYLES = {
    "photo": (
        split("""
            a photo of; a film photograph of; a high-resolution photograph of; a cinematic photo of
        """),
        split("""
            35mm film, fine grain; 85mm lens, shallow depth of field; natural colors; editorial
            photo; sharp focus
        """),
    ),
    "paint": (
        split("""
            an oil painting of; a loose watercolor of; a gouache painting of; an impressionist
            painting of; an ink and wash drawing of; a soft pastel drawing of; a woodblock print of
        """),
        split("""
            oil on canvas, visible brushstrokes; delicate watercolor on rough paper; colored pencil
            drawing; vintage travel poster style
        """),
    ),
    "digital": (
        split("""
            a digital painting of; concept art of; an anime-style illustration of; a flat vector
            illustration of; pixel art of
        """),
        split("""
            cel-shaded illustration; detailed digital art; matte painting; graphic novel style
        """),
    ),
    "3d": (
        split("a 3D render of; a low poly 3D render of; a clay model of; a paper-craft model of"),
        split("""
            soft global illumination, 3D render; claymation style; smooth plastic 3D render; felt
            and wool miniature
        """),
    ),
}


def picture_maker(rng, styles, subjects, details, light):
    """A function that returns a new description at each call, its style at the start or at the
    end."""

    def make():
        openings, endings = STYLES[pick(rng, styles.split())]
        detail = pick(rng, split(details))
        shine = pick(rng, LIGHT[light] or [""])
        first = pick(rng, [pick(rng, openings) + " ", ""])
        last = []
        if not first:
            last = [pick(rng, endings)]
        middle = pick(rng, [[detail], [shine], [detail, shine], [shine, detail]])
        line = ", ".join(part for part in [first + next(subjects), *middle, *last] if part)
        return pick(rng, [line, sentence(line) + "."])

    return make


def make_pickscore(rng, sizes=(1100, 200), held_out=0.16):
    train = []
    test = []
    for styles, subject, details, light in fields_of(PICTURES):
        subjects = shuffled(rng, readings(subject))
        cut = round(held_out * len(subjects))
        train.append(picture_maker(rng, styles, deal(rng, subjects[cut:]), details, light))
        test.append(picture_maker(rng, styles, deal(rng, subjects[:cut]), details, light))
    seen = set()
    files = []
    for makers, size in zip((train, test), sizes, strict=True):
        files.append(write_lines(rng, makers, size, range(6, 41), seen))
    return files


# ---- Checks and files


def quoted(line):
    _, text, _ = line.split('"')
    return text.lower()


def check_properties(written):
    """What the module's first lines promise, of the lines about to be written and of the
    benchmark's."""
    files = {**written, "geneval/test.jsonl": benchmark()}
    for name, lines in files.items():
        assert all(
            line.isascii() and line == line.strip() and "  " not in line for line in lines
        ), name
        assert len(set(lines)) == len(lines), name
        assert not any(
            re.search(r"\b[Aa] [aeio]|\b[Aa] u(?!n)|\b[Aa]n [^aeiou]", line) for line in lines
        ), name
    for task, suffix in (("ocr", "txt"), ("geneval", "jsonl"), ("pickscore", "txt")):
        train = files[f"{task}/train.{suffix}"]
        test = files[f"{task}/test.{suffix}"]
        assert not set(train) & set(test), task
        if task == "ocr":
            assert not set(map(quoted, train)) & set(map(quoted, test)), task
    strangers = {text.lower().replace(" ", "") for text in FLOW_GRPO_TEST_TEXTS}
    for line in files["ocr/train.txt"] + files["ocr/test.txt"]:
        assert quoted(line).replace(" ", "") not in strangers, line
        assert 10 <= len(line.split()) <= 40 and 1 <= len(quoted(line).split()) <= 5, line
        assert re.fullmatch(r"[a-z0-9 '!&:.-]+", quoted(line)), line
    for name in ("ocr/train.txt", "ocr/test.txt"):
        assert {len(quoted(line).split()) for line in files[name]} == {1, 2, 3, 4, 5}, name
    for line in files["pickscore/train.txt"] + files["pickscore/test.txt"]:
        assert 6 <= len(line.split()) <= 40 and '"' not in line, line
    train = "\n".join(files["pickscore/train.txt"]).lower()
    test = "\n".join(files["pickscore/test.txt"]).lower()
    for subject in (reading for _, text, *_ in fields_of(PICTURES) for reading in readings(text)):
        assert not (subject.lower() in train and subject.lower() in test), subject
    check_geneval(files["geneval/train.jsonl"], files["geneval/test.jsonl"])


def check_geneval(train, test):
    train = [json.loads(line) for line in train]
    test = [json.loads(line) for line in test]
    prompts = sorted(entry["prompt"] for entry in test)
    assert len(prompts) == 553
    text = "".join(prompt + "\n" for prompt in prompts)
    digest = hashlib.sha256(text.encode("ascii")).hexdigest()
    assert digest == GENEVAL_TEST_SHA256, "geneval/test.jsonl is not the benchmark's"
    assert not {scene_of(entry) for entry in train} & {scene_of(entry) for entry in test}
    assert len({entry["prompt"] for entry in train + test}) == len(train + test)
    for entries in (train, test):
        objects = [one for entry in entries for one in entry["include"]]
        assert {one["class"] for one in objects} == set(CLASSES) and len(CLASSES) == 80
        assert {one["color"] for one in objects if "color" in one} == set(COLORS)
    for entries, sizes in ((train, GENEVAL_TRAIN), (test, GENEVAL_TEST)):
        assert len(entries) == sum(sizes.values())
        for tag, size in sizes.items():
            assert sum(entry["tag"] == tag for entry in entries) == size, tag
        assert all(one["class"] in entry["prompt"] for entry in entries for one in entry["include"])


def make_all():
    """{name: lines}; each task draws from a seed of its own, so that a change to one leaves the
    others as they are."""
    files = {}
    files["ocr/train.txt"], files["ocr/test.txt"] = make_ocr(random.Random(2))
    files["geneval/train.jsonl"] = make_geneval(random.Random(3))
    files["pickscore/train.txt"], files["pickscore/test.txt"] = make_pickscore(random.Random(4))
    return files


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if a file differs"
    )
    check = parser.parse_args().check
    files = make_all()
    check_properties(files)
    differ = []
    for name, lines in files.items():
        path = HERE / name
        content = "".join(line + "\n" for line in lines).encode("ascii")
        if check:
            if not path.is_file() or path.read_bytes() != content:
                differ.append(name)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            print(f"{name}: {len(lines)} lines")
    for name in differ:
        print(f"{name} differs from what make_prompts.py writes", file=sys.stderr)
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
