"""The small world the corpus talks about: word lists and simple facts, written for this project.

Only data. Every fact is plain and common so that a tiny model can state it fluently.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Animal:
    name: str
    sound: str  # third person: "a cow says moo"
    food: str
    home: str  # with its preposition: "on a farm"
    young: str
    legs: str
    trait: str  # an adjective
    skill: str  # follows "can"


@dataclass(frozen=True)
class Thing:
    name: str
    use: str  # follows "is used to"
    material: str
    place: str  # with its preposition
    trait: str


@dataclass(frozen=True)
class Food:
    name: str  # as in "an apple" or "bread", with its article where it has one
    color: str
    taste: str
    kind: str  # with its article: "a fruit"
    source: str  # follows "comes from"


@dataclass(frozen=True)
class Job:
    name: str
    work: str  # third person verb phrase
    place: str  # with its preposition
    tool: str


def listed(text: str) -> list[str]:
    """The words of the text, in order."""
    return text.split()


def _rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]


ANIMALS = [
    Animal(*row)
    for row in _rows("""
cow|moo|grass|on a farm|calf|four|gentle|give milk
dog|woof|meat|in a house|puppy|four|loyal|guard the house
cat|meow|fish|in a house|kitten|four|quiet|climb a tree
duck|quack|small plants|on a pond|duckling|two|calm|swim very well
sheep|baa|grass|in a field|lamb|four|woolly|give warm wool
pig|oink|corn|on a farm|piglet|four|clever|roll in the mud
horse|neigh|hay|in a stable|foal|four|strong|run very fast
hen|cluck|seeds|on a farm|chick|two|busy|lay eggs
frog|croak|flies|near a pond|tadpole|four|jumpy|jump very far
bee|buzz|nectar|in a hive|larva|six|busy|make honey
owl|hoot|mice|in the forest|owlet|two|wise|see in the dark
lion|roar|meat|on the plain|cub|four|brave|roar very loudly
mouse|squeak|cheese|in a small hole|pup|four|tiny|hide in a corner
bear|growl|berries|in the forest|cub|four|strong|sleep all winter
wolf|howl|meat|in the forest|pup|four|wild|howl at the moon
goat|bleat|leaves|on the hill|kid|four|curious|climb steep rocks
snake|hiss|mice|in the grass|snakelet|no|silent|move without legs
goose|honk|grass|near a lake|gosling|two|loud|fly a long way
crow|caw|seeds|in a tall tree|chick|two|clever|solve small puzzles
elephant|trumpet|leaves|on the plain|calf|four|huge|lift heavy logs
monkey|chatter|fruit|in the jungle|infant|four|playful|swing from trees
rabbit|squeak|carrots|in a burrow|kit|four|soft|hop very quickly
fox|yelp|mice|in a den|kit|four|sly|run without a sound
deer|grunt|leaves|in the forest|fawn|four|shy|leap over a fence
parrot|squawk|nuts|in the jungle|chick|two|colorful|copy what people say
penguin|honk|fish|on the ice|chick|two|funny|slide on the ice
donkey|bray|hay|on a farm|foal|four|stubborn|carry heavy bags
turkey|gobble|corn|on a farm|chick|two|proud|spread its tail
whale|sing|tiny shrimp|in the sea|calf|no|enormous|dive very deep
seal|bark|fish|on the shore|pup|no|smooth|swim under the ice
squirrel|chatter|nuts|in a tree|kit|four|quick|hide nuts for winter
tiger|roar|meat|in the jungle|cub|four|fierce|swim across a river
""")
]

THINGS = [
    Thing(*row)
    for row in _rows("""
hammer|hit nails|steel|in a toolbox|heavy
spoon|eat soup|metal|in the kitchen|shiny
pen|write words|plastic|on the desk|thin
lamp|light a room|glass|on the table|bright
chair|sit on|wood|in the kitchen|sturdy
bed|sleep in|wood|in the bedroom|soft
cup|drink tea|clay|on the shelf|small
key|open a door|metal|in a pocket|small
clock|tell the time|metal|on the wall|round
book|read stories|paper|on the shelf|interesting
umbrella|stay dry in the rain|cloth|by the door|wide
broom|sweep the floor|straw|in the corner|long
kite|fly in the wind|paper|in the sky|light
drum|make music|wood|in the music room|loud
boat|cross the water|wood|on the lake|slow
bicycle|ride to school|steel|in the yard|fast
ladder|reach high places|wood|in the shed|tall
bucket|carry water|metal|in the garden|deep
blanket|keep warm|wool|on the bed|soft
scarf|keep the neck warm|wool|on a hook|long
mirror|see your face|glass|on the wall|clean
brush|paint a picture|hair|in a jar|thin
basket|carry fruit|straw|on the floor|round
candle|make light|wax|on the table|warm
bell|call people|brass|in the tower|loud
rope|tie things|cotton|in the shed|strong
shovel|dig a hole|steel|in the garden|heavy
map|find the way|paper|in a bag|large
ball|play games|rubber|in the yard|round
knife|cut bread|steel|in the kitchen|sharp
pot|cook soup|iron|on the stove|hot
needle|sew clothes|steel|in a box|sharp
coat|stay warm outside|wool|by the door|thick
radio|hear the news|plastic|in the kitchen|old
saw|cut wood|steel|in the shed|sharp
""")
]

FOODS = [
    Food(*row)
    for row in _rows("""
an apple|red|sweet|a fruit|a tree
a banana|yellow|sweet|a fruit|a tall plant
a lemon|yellow|sour|a fruit|a tree
a carrot|orange|crunchy|a vegetable|the ground
bread|brown|soft|a baked food|an oven
milk|white|creamy|a drink|a cow
honey|golden|very sweet|a syrup|bees
cheese|yellow|salty|a dairy food|milk
a tomato|red|juicy|a fruit|a vine
a potato|brown|plain|a vegetable|the ground
a cherry|red|sweet|a fruit|a tree
a pear|green|sweet|a fruit|a tree
a grape|purple|juicy|a fruit|a vine
spinach|green|bitter|a vegetable|a leafy plant
rice|white|plain|a grain|a wet field
corn|yellow|sweet|a grain|a tall stalk
chocolate|brown|rich|a treat|cocoa beans
an egg|white|mild|a simple food|a hen
salt|white|salty|a seasoning|the sea
a pea|green|sweet|a vegetable|a pod
a plum|purple|juicy|a fruit|a tree
a mushroom|brown|earthy|a simple food|the forest
tea|brown|bitter|a drink|dried leaves
butter|yellow|creamy|a dairy food|milk
a pumpkin|orange|mild|a vegetable|a vine
a strawberry|red|sweet|a fruit|a small plant
""")
]

JOBS = [
    Job(*row)
    for row in _rows("""
baker|bakes bread|in a bakery|an oven
teacher|teaches children|in a school|a board
doctor|helps sick people|in a hospital|a thermometer
farmer|grows food|on a farm|a tractor
sailor|sails ships|on the sea|a rope
painter|paints pictures|in a studio|a brush
pilot|flies planes|in the sky|a radio
tailor|makes clothes|in a small shop|a needle
cook|makes meals|in a kitchen|a pot
gardener|cares for plants|in a garden|a shovel
builder|builds houses|on a building site|a hammer
writer|writes stories|at a desk|a pen
singer|sings songs|on a stage|a microphone
nurse|cares for patients|in a hospital|a bandage
fisher|catches fish|on a boat|a net
driver|drives a bus|on the road|a wheel
dentist|fixes teeth|in a clinic|a small mirror
barber|cuts hair|in a barber shop|a comb
miner|digs for coal|under the ground|a lamp
carpenter|makes furniture|in a workshop|a saw
postman|brings letters|on the street|a bag
guard|watches the gate|at the castle|a torch
librarian|lends books|in a library|a list
clown|makes people laugh|in a circus|a red nose
plumber|fixes pipes|in many homes|a wrench
""")
]

OPPOSITES = _rows("""
hot|cold
big|small
fast|slow
day|night
up|down
happy|sad
wet|dry
old|young
loud|quiet
open|closed
hard|soft
light|dark
early|late
full|empty
high|low
long|short
thick|thin
clean|dirty
strong|weak
near|far
good|bad
left|right
rich|poor
sweet|sour
brave|afraid
heavy|light
first|last
inside|outside
wide|narrow
win|lose
push|pull
begin|end
friend|enemy
summer|winter
north|south
east|west
""")

COLORS_OF = _rows("""
the sky|blue
grass|green
snow|white
coal|black
blood|red
the sun|yellow
a cloud|white
a leaf|green
the night|black
the sea|blue
sand|yellow
chalk|white
a rose|red
a fire truck|red
smoke|gray
a brick|red
wood|brown
gold|yellow
silver|gray
ash|gray
""")

# Words for things said at sea; the demo task's voice borrows them (see ``pirate``), and seeing
# them here as plain vocabulary keeps their token embeddings from being untrained noise.
MEANINGS = _rows("""
matey|a friend on a ship
ahoy|hello at sea
aye|yes
arr|yes, said with a growl
yo ho|the start of a sea song
ye|you
captain|the leader of a ship
anchor|a weight that holds a ship
mast|the tall pole of a ship
deck|the floor of a ship
harbor|a safe place for ships
treasure|gold and jewels in a chest
glad|happy
tiny|very small
huge|very big
swift|very fast
weary|very tired
silent|very quiet
dawn|the start of the day
dusk|the end of the day
""")

ORDERED = {
    "day": listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    "month": listed(
        "January February March April May June July August September October November December"
    ),
    "number": listed(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
        " fifteen sixteen seventeen eighteen nineteen twenty"
    ),
}
NUMBERS = ORDERED["number"]

GIRLS = listed(
    "Anna Mia Lily Rosa Nora Ella Sara Zoe Ivy Clara June Maya Ruth Emma Lucy Tara Nina Alice"
)
BOYS = listed(
    "Tom Ben Max Leo Sam Jack Finn Omar Luke Noah Paul Hugo Ravi Adam Ned Oscar Theo Will"
)

COLORS = listed("red blue green yellow white black brown purple orange golden")
SIZES = listed("small big little tiny huge tall round old new")
FEELINGS_BAD = listed("sad afraid lonely angry tired worried upset cold hungry")
FEELINGS_GOOD = listed("happy proud glad calm brave excited thankful warm cheerful")
WEATHER = [
    ("sunny", "The sun was shining and the sky was blue."),
    ("rainy", "The rain fell softly on the roof."),
    ("windy", "The wind blew the leaves around."),
    ("snowy", "White snow covered the ground."),
    ("cloudy", "Gray clouds hung over the hills."),
    ("cold", "The air was cold and clear."),
    ("warm", "A warm breeze moved through the trees."),
    ("foggy", "A thick fog lay over the fields."),
    ("stormy", "Thunder rolled far away."),
]
TIMES = [
    "One day", "One morning", "One evening", "Last summer", "On Sunday", "After school",
    "Before dinner", "Early in the morning", "One winter day", "Long ago", "On a quiet afternoon",
]  # fmt: skip
PLACES = [
    "the park", "the forest", "the river", "the garden", "the beach", "the market", "the school",
    "the hill", "the lake", "the farm", "the library", "the village", "the old bridge",
]  # fmt: skip
