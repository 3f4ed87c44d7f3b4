"""Write the tiny model's training data: dialogs made from templates, in PERSONA-CHAT's JSON format.

From natural dialogs, such as those in data/sample/, a transformer of this size with random weights does not learn to
use the persona. It learns these dialogs in a minute or two on a CPU, and they still reward the right skill, which is
to read the persona.

The tables below hold fourteen topics (job, pets, food, ...) with ten values each (a baker, a nurse, ...); by default
seven topics with five values are used. A persona consists of four or five values from different topics. In a dialog the
user, who speaks first, asks about those topics, and the bot answers with facts that belong to its value: a baker talks
about bread and ovens. The question alone tells only the topic, so the right answer depends on the persona.

    {"train": [entry, ...], "valid": [entry, ...]}
    entry     = {"personality": [sentence, ...], "utterances": [turn, ...]}
    turn      = {"history": [user, bot, user, ...], "candidates": [distractor, ..., the right reply]}

No two dialogs in the file have the same set of persona values, so no persona of `valid` occurs in `train`. Sentences
and facts do recur: the model has to generalise to new combinations, not to new words. All text was written for this
project.

    python -m models.tiny_corpus --out FILE.json [--seed 42]
"""
import argparse
import json
import random
from collections import Counter
from pathlib import Path

from cli import Number, command, whole_number

# ---------------------------------------------------------------------------------------------------------------------
# Content. A topic has
#   persona  ways to say the value in the persona             tell  ways in which the user says his own value
#   ask      questions of the user about the topic            reply ways to answer, with a value {v} and a fact {f}
#   more     follow-up questions, each with the words that may open the answer
#   values   value -> two facts that go with the first answer (upper line), two that answer a follow-up (lower line)
# A fact must fit every question of its topic. It must not name another value of the topic or claim anything about
# another topic (a fact about hobbies that mentions "my dog" would contradict the persona of a cat owner).
# ---------------------------------------------------------------------------------------------------------------------
TOPICS = {
    "job": {
        "persona": ["i work as {v} .", "i am {v} .", "i earn my living as {v} ."],
        "ask": ["what do you do for a living ?", "what is your job ?", "where do you work ?",
                "what kind of work do you do ?",
                "do you have a job ?"],
        "tell": ["i work as {v} .", "i am {v} ."],
        "reply": ["i am {v} , {f} .", "i work as {v} . {f} .", "i am {v} and {f} .", "{f} , i am {v} ."],
        "more": {"do you like your job ?": ["yes ,", "i do ,", "very much ,"],
                 "do you enjoy the work ?": ["yes ,", "sure ,"],
                 "tell me more about your work .": ["well ,", ""]},
        "values": {
            "a baker": ("i make bread every morning", "my oven is hot before sunrise",
                        "the smell of warm bread is lovely", "i do not mind flour on my hands"),
            "a nurse": ("i look after sick people", "i work nights at the hospital",
                        "my patients are kind to me", "the hospital is never boring"),
            "a teacher": ("i teach math at a school", "my class is full of noise",
                          "the kids in my class are funny", "i like to see kids learn math"),
            "a barber": ("i cut hair all day", "i trim beards in a small shop",
                         "people tell me jokes while i cut hair", "a neat beard makes me proud"),
            "a mechanic": ("i fix engines all day", "i repair cars in a garage",
                           "a clean engine sounds so sweet", "i do not mind oil on my hands"),
            "a librarian": ("i help people find books", "it is quiet between the shelves",
                            "i see all the new books first", "the shelves are like old friends"),
            "a fire fighter": ("i put out fires", "the alarm can ring at any hour",
                               "my crew at the station is great", "it feels good to save people from smoke"),
            "a carpenter": ("i build tables out of oak", "my shop smells of wood",
                            "i like to see a chair take shape", "a saw and good wood is all i need"),
            "a dentist": ("i clean teeth all day", "people fear my drill",
                          "a bright smile makes me proud", "people with tooth pain thank me later"),
            "a tailor": ("i sew suits by hand", "needle and thread pay my bills",
                         "a suit that fits makes me proud", "i love soft cloth and shiny buttons"),
        },
    },
    "pets": {
        "persona": ["i have {v} at home .", "i share my home with {v} .", "i take care of {v} ."],
        "ask": ["do you have any pets ?", "do you have a pet ?", "what pets do you have ?",
                "do you keep any animals ?",
                "i love animals , do you have any ?"],
        "tell": ["i have {v} .", "i have {v} at home ."],
        "reply": ["i have {v} , {f} .", "i have {v} at home . {f} .", "i live with {v} and {f} ."],
        "more": {"aw , that is so cute !": ["yes ,", ""], "is that a lot of work ?": ["not really ,", "a little ,"],
                 "tell me more about your pets .": ["well ,", ""]},
        "values": {
            "two dogs": ("they bark at the mail man", "we walk in the park twice a day",
                         "they wag their tails when i come home", "they love to fetch a stick"),
            "an old cat": ("she sleeps on the sofa", "she purrs like a motor",
                           "she naps in the sun all day", "she chases a ball of yarn"),
            "a parrot": ("he repeats all i say", "he says good morning to me",
                         "he can whistle a tune", "his feathers are so bright"),
            "a rabbit": ("he eats carrots from my hand", "he hops around the kitchen",
                         "his long ears are so soft", "he just needs hay and carrots"),
            "a turtle": ("he is very slow", "he hides in his shell",
                         "he may live for eighty years", "his shell is as hard as stone"),
            "a hamster": ("he runs in his wheel all night", "he hides seeds in his cheeks",
                          "his wheel keeps me awake", "his cheeks are so round"),
            "a tank of fish": ("they swim in circles", "the tank glows in the dark",
                               "they calm me down when they swim", "i only clean the tank on fridays"),
            "a lizard": ("he sits under a hot lamp", "he eats crickets",
                         "his skin feels dry and cool", "he just needs his lamp and crickets"),
            "two frogs": ("they croak all night", "they live in a glass pond",
                          "they jump so high", "they catch flies with the tongue"),
            "a spider": ("she spins a new web each week", "she has eight hairy legs",
                         "my guests are scared of her legs", "her web is a work of art"),
        },
    },
    "food": {
        "persona": ["my favorite food is {v} .", "i could eat {v} every day .", "i love to eat {v} ."],
        "ask": ["what is your favorite food ?", "what do you like to eat ?", "i am hungry , what food do you like ?",
                "what do you eat for dinner ?", "what is the best meal ?"],
        "tell": ["i love to eat {v} .", "my favorite food is {v} ."],
        "reply": ["i love {v} , {f} .", "my favorite is {v} . {f} .", "{v} for me , {f} .",
                  "i eat a lot of {v} and {f} ."],
        "more": {"do you eat that often ?": ["yes ,", "i do ,"], "is it really that good ?": ["yes ,", "oh yes ,"],
                 "that makes me hungry !": ["me too ,", ""]},
        "values": {
            "pizza": ("i want extra cheese on it", "i like a thin crust",
                      "i can eat ten slices", "hot cheese on a crust is heaven"),
            "sushi": ("i like raw salmon and rice", "i use chop sticks",
                      "fresh salmon is so tender", "i roll the rice myself"),
            "tacos": ("i like them with hot salsa", "i put beans in them",
                      "i make them each tuesday", "the salsa burns my tongue"),
            "pasta": ("i put garlic in the sauce", "i make the noodles by hand",
                      "garlic makes everything better", "noodles are so easy to cook"),
            "curry": ("i like it very spicy", "i cook it with many spices",
                      "my kitchen smells of spices", "the spicy ones make me cry"),
            "vegetable soup": ("i cook a big pot of it", "i add leeks and carrots",
                               "a big pot lasts all week", "a warm bowl is good for you"),
            "burgers": ("i like them with pickles", "i grill them with onions",
                        "the grill is hot each sunday", "a soft bun with pickles is the best"),
            "fried chicken": ("i like the crispy skin", "i eat the wings first",
                              "i can finish a bucket of wings", "crispy is the best word i know"),
            "green salad": ("i put nuts on top", "i grow the lettuce myself",
                            "fresh lettuce keeps me healthy", "i add olives and nuts"),
            "apple pie": ("i like it warm with cream", "i use lots of cinnamon",
                          "cinnamon and cream are a dream", "i bake one every sunday"),
        },
    },
    "hobby": {
        "persona": ["in my free time i like {v} .", "my hobby is {v} .", "i spend my weekends {v} ."],
        "ask": ["what do you do for fun ?", "do you have any hobbies ?", "what do you do in your free time ?",
                "what is your hobby ?", "what are you up to on weekends ?"],
        "tell": ["my hobby is {v} .", "i enjoy {v} on weekends ."],
        "reply": ["i enjoy {v} , {f} .", "my hobby is {v} . {f} .", "i like {v} and {f} ."],
        "more": {"have you done that for long ?": ["for years ,", "since i was a kid ,"],
                 "that sounds fun .": ["it is ,", "yes ,"],
                 "are you good at it ?": ["i think so ,", "i try ,"]},
        "values": {
            "painting": ("i paint lakes and hills", "my brushes are everywhere",
                         "now i sell a canvas now and then", "i need new brushes every month"),
            "gardening": ("my roses bloom all year", "i pull weeds for hours",
                          "now my tomatoes win prizes", "my roses are taller than me"),
            "knitting": ("i make scarves and socks", "i buy too much wool",
                         "now all my friends wear my socks", "i can make a scarf in a day"),
            "fishing": ("i caught a huge trout", "i sit by the lake for hours",
                        "i once caught ten trout in a day", "i have a very good rod"),
            "taking photos": ("my camera is always with me", "i like to shoot old bridges",
                              "now i own three lenses", "my camera was worth every cent"),
            "playing chess": ("i never lose my queen", "i am in a club for it",
                              "my opening moves are strong", "i won the club cup"),
            "dancing": ("i know how to tango", "my feet never stop",
                        "i can tango for hours", "my partner and i won a waltz contest"),
            "camping": ("i sleep in a tent", "i tell stories by the fire",
                        "i can put up a tent in minutes", "i can light a fire with one match"),
            "collecting stamps": ("my album has rare ones", "i trade them by mail",
                                  "my album is worth a lot now", "i own one from the year 1900"),
            "watching birds": ("i saw an owl last night", "i get up early for the robins",
                               "i know every owl by its call", "i never leave without binoculars"),
        },
    },
    "music": {
        "persona": ["i listen to {v} a lot .", "my favorite music is {v} .", "i always play {v} on the radio ."],
        "ask": ["what music do you like ?", "what kind of music do you listen to ?", "do you like music ?",
                "what is on your radio ?", "what songs do you like ?"],
        "tell": ["i listen to {v} .", "i love {v} ."],
        "reply": ["i listen to {v} , {f} .", "i love {v} . {f} .", "mostly {v} , {f} ."],
        "more": {"do you go to concerts ?": ["sometimes ,", "yes ,"],
                 "what do you like about that music ?": ["well ,", ""],
                 "i should listen to that too .": ["you should ,", "please do ,"]},
        "values": {
            "jazz": ("the saxophone is so smooth", "i go to a smoky club",
                     "the sax solos are never the same", "they play so freely"),
            "rock": ("i like loud drums", "i wear band shirts",
                     "the drums shake the floor", "the drummer is my hero"),
            "country": ("i wear cowboy boots for it", "i like a good banjo",
                        "the banjo makes me smile", "everybody wears cowboy boots there"),
            "classical": ("the violins make me calm", "i fall asleep to symphonies",
                          "a symphony tells a long story", "the violins give me chills"),
            "hip hop": ("i know all the rhymes", "i like a deep beat",
                        "the rhymes are so clever", "the beat makes my head nod"),
            "the blues": ("the sad songs touch me", "i like a slow harmonica",
                          "the harmonica sounds so lonely", "sad songs make me feel better"),
            "folk": ("i like old ballads", "i hum along with the fiddle",
                     "the ballads are hundreds of years old", "the fiddle makes people clap"),
            "metal": ("the screams wake me up", "i bang my head to it",
                      "my neck hurts after the head banging", "the screams are fun"),
            "opera": ("the singers have huge voices", "i cry when the tenor sings",
                      "the tenor breaks my heart", "the costumes are rich"),
            "reggae": ("it makes me think of palm trees", "i like the lazy rhythm",
                       "the lazy rhythm slows me down", "everyone there is so relaxed"),
        },
    },
    "home": {
        "persona": ["i live in {v} .", "i have lived in {v} for years .", "i moved to {v} ."],
        "ask": ["where do you live ?", "where are you from ?", "what is your home like ?",
                "do you live in the city ?",
                "where is your home ?"],
        "tell": ["i live in {v} .", "these days i live in {v} ."],
        "reply": ["i live in {v} , {f} .", "these days i live in {v} . {f} .", "in {v} , {f} ."],
        "more": {"do you like living there ?": ["yes ,", "i do ,", "very much ,"],
                 "that sounds like a nice place .": ["it is ,", "yes ,"],
                 "would you ever move away ?": ["never ,", "no ,"]},
        "values": {
            "a beach house": ("i hear the waves at night", "there is sand on my floor",
                              "the waves sing me to sleep", "i pick up shells every day"),
            "the woods": ("deer come to my door", "there are pines all around",
                          "the pines smell so good", "the deer are my neighbors"),
            "a tall tower": ("i am on floor thirty", "i take the elevator up",
                             "i can see the whole city from up there", "the lights below look great"),
            "a tiny village": ("all the people know my name", "there is just one store",
                               "people always stop to say hello", "nobody locks the door"),
            "a house boat": ("it rocks me to sleep", "ducks swim past my window",
                             "the river is my back yard", "the ducks wake me up"),
            "the mountains": ("the air is thin and clean", "the view from the top is huge",
                              "the peaks are pretty at dawn", "the clean air is good for me"),
            "the desert": ("there is a cactus by my door", "it is dry and wide",
                           "the dunes change every day", "the sky there is endless"),
            "an old farm": ("there is a big barn", "my neighbors are cows",
                            "the barn is full of hay", "fresh eggs every day are nice"),
            "a college town": ("students are everywhere", "i am close to the campus",
                               "the students keep me young", "there is always a party on campus"),
            "a trailer": ("i can park it anywhere", "my home has wheels",
                          "life on wheels is freedom", "there is not much to clean"),
        },
    },
    "family": {
        "persona": ["i have {v} .", "i am lucky to have {v} .", "my family is great , i have {v} ."],
        "ask": ["do you have a family ?", "tell me about your family .", "do you have a big family ?",
                "who is in your family ?", "are you close to your family ?"],
        "tell": ["i have {v} .", "my family is nice , i have {v} ."],
        "reply": ["i have {v} , {f} .", "i have {v} . {f} .", "well , i have {v} and {f} ."],
        "more": {"do you see your family often ?": ["yes ,", "every week ,"],
                 "that must be nice .": ["it is ,", "yes ,"],
                 "family is important .": ["so true ,", "it is ,"]},
        "values": {
            "three sisters": ("they share all my clothes", "i am the only boy",
                              "we talk all night long", "they still borrow my clothes"),
            "a twin brother": ("we look the same", "people mix us up",
                               "he has the same face as me", "nobody can tell us apart"),
            "four sons": ("the boys eat a lot", "it is never quiet with them",
                          "the boys wrestle all the time", "i cook mountains for the boys"),
            "a baby girl": ("she cries at night", "i change diapers now",
                            "she just learned to crawl", "she giggles at my face"),
            "ten cousins": ("our reunions are huge", "we all meet at reunions",
                            "we need a very long table", "i forget half of the names"),
            "a wise grandmother": ("she is ninety years old", "she gives good advice",
                                   "her advice is always right", "she tells me about the old times"),
            "a funny uncle": ("he does magic tricks", "he wears silly ties",
                              "he pulls coins out of my ear", "his magic tricks never work"),
            "a teenage daughter": ("she slams doors", "she is on her phone all day",
                                   "she rolls her eyes at me", "she only looks up from her phone for money"),
            "a loving husband": ("we got married last june", "he brings me flowers",
                                 "our wedding was wonderful", "he still holds my hand"),
            "a young nephew": ("i watch him on fridays", "he builds forts from pillows",
                               "we build forts together", "he asks me why all the time"),
        },
    },
    "sport": {
        "persona": ["my favorite sport is {v} .", "{v} keeps me fit .", "i am crazy about {v} ."],
        "ask": ["do you play any sports ?", "what is your favorite sport ?", "how do you stay fit ?",
                "do you like sports ?",
                "do you work out ?"],
        "tell": ["my sport is {v} .", "{v} keeps me fit ."],
        "reply": ["{v} is my sport , {f} .", "my favorite is {v} . {f} .", "i am into {v} and {f} .",
                  "i love {v} , {f} ."],
        "more": {"do you train a lot ?": ["yes ,", "every day ,"], "is it hard ?": ["a bit ,", "not for me ,"],
                 "you must be very fit !": ["thanks ,", "i hope so ,"]},
        "values": {
            "tennis": ("i have a strong serve", "i own five rackets",
                       "my serve gets better", "my racket is part of me"),
            "soccer": ("i am the goalie", "i score with my left foot",
                       "i kick the ball around a lot", "the goalie never gets to rest"),
            "basketball": ("i can dunk", "i am tall so it is easy",
                           "i shoot a hundred hoops", "being tall helps me dunk"),
            "swimming": ("i do fifty laps", "the pool is my second home",
                         "i am in the pool at six", "the laps clear my mind"),
            "running": ("i do six miles a day", "i wear out my shoes",
                        "the last miles hurt", "i need new shoes all the time"),
            "yoga": ("i can stand on my head", "i stretch every morning",
                     "i bend and breathe", "my mat is always on the floor"),
            "golf": ("i hit a hole in one", "i buy new clubs too often",
                     "my swing needs work", "the clubs are so heavy"),
            "hockey": ("i lost a tooth to a puck", "i skate very fast",
                       "the ice is my friend", "my skates are always sharp"),
            "boxing": ("i have a mean left hook", "i wear big gloves",
                       "i punch a heavy bag", "the gloves make me brave"),
            "skiing": ("i race down the slopes", "i broke a leg once",
                       "the steep slopes scare me", "i take the lift up all day"),
        },
    },
    "color": {
        "persona": ["my favorite color is {v} .", "i like the color {v} best .", "i own many {v} things ."],
        "ask": ["what is your favorite color ?", "which color do you like best ?",
                "what color should i paint my room ?",
                "do you have a favorite color ?"],
        "tell": ["my favorite color is {v} .", "i like {v} ."],
        "reply": ["my favorite color is {v} , {f} .", "i like {v} best . {f} .", "{v} ! {f} ."],
        "more": {"do you wear that color a lot ?": ["yes ,", "all the time ,"],
                 "that is a nice color .": ["it is ,", "thanks ,"],
                 "why that color ?": ["well ,", ""]},
        "values": {
            "red": ("it is the color of fire", "it makes me think of cherries",
                    "i look hot as fire in it", "cherries and lipstick make me happy"),
            "blue": ("it is the color of the sea", "it makes me think of the sky",
                     "the sky puts me in a good mood", "all my jeans have it"),
            "green": ("it is the color of grass", "it makes me think of leaves",
                      "fresh grass makes me feel calm", "i look like a leaf in it"),
            "yellow": ("it is the color of the sun", "it makes me think of lemons",
                       "i look like a lemon in it", "it is like sun on my skin"),
            "purple": ("it is the color of kings", "it makes me think of grapes",
                       "kings and queens loved it too", "i look like a grape in it"),
            "orange": ("it is the color of pumpkins", "it makes me think of sunsets",
                       "a sunset is the best sight", "i look like a pumpkin in it"),
            "pink": ("it is the color of bubble gum", "it makes me think of pigs",
                     "even my lips are like bubble gum", "flamingos and pigs have it too"),
            "black": ("it is the color of night", "it goes with everything",
                      "i like to hide in the night", "it makes me look thin and serious"),
            "white": ("it is the color of snow", "it makes me think of clouds",
                      "it is as clean as snow", "i float like a cloud in it"),
            "brown": ("it is the color of the earth", "it makes me think of teddy bears",
                      "it hides the mud and earth", "i look like a teddy bear in it"),
        },
    },
    "travel": {
        "persona": ["my best trip was to {v} .", "i went to {v} last year .", "i love to travel to {v} ."],
        "ask": ["do you like to travel ?", "what was your best trip ?", "where do you go on vacation ?",
                "have you been to another country ?", "where did you travel last year ?"],
        "tell": ["i just came back from {v} .", "i travel to {v} every year ."],
        "reply": ["i went to {v} , {f} .", "my best trip was to {v} . {f} .", "{v} was great , {f} .",
                  "i was in {v} and {f} ."],
        "more": {"would you go there again ?": ["yes ,", "any time ,"],
                 "what was the best part of the trip ?": ["hmm ,", ""],
                 "i would love to go there .": ["you should ,", "do it ,"]},
        "values": {
            "italy": ("i saw the leaning tower", "i rode a gondola in venice",
                      "venice is so romantic", "rome is full of ruins"),
            "japan": ("the cherry trees were in bloom", "i rode the bullet train",
                      "the temples in kyoto are so calm", "tokyo never sleeps"),
            "egypt": ("i saw the pyramids", "i sat on a camel",
                      "the pyramids are unreal", "the nile is so wide"),
            "mexico": ("i saw old maya temples", "i danced to mariachi music",
                       "the mariachi bands are fun", "the maya knew the stars"),
            "india": ("i saw the taj mahal", "i met an elephant",
                      "the elephant was so gentle", "the taj mahal shines at dawn"),
            "france": ("i climbed the eiffel tower", "i ate snails in paris",
                       "paris is for lovers", "the louvre takes days to see"),
            "norway": ("i saw deep fjords", "the sun never set",
                       "the fjords took my breath away", "the sun shines at midnight"),
            "kenya": ("i saw lions on safari", "a giraffe looked in my tent",
                      "the lions came so close", "the giraffes are so graceful"),
            "brazil": ("i saw the carnival in rio", "i walked in the rain forest",
                       "rio is one big carnival", "the amazon is full of life"),
            "greece": ("i saw the old temples of athens", "i slept on a tiny island",
                       "each island is better than the last", "athens is so old"),
        },
    },
    "weather": {
        "persona": ["i feel best in {v} .", "i am always happy in {v} .", "i love to be outside in {v} ."],
        "ask": ["what weather do you like ?", "what is your favorite season ?", "do you like the cold or the sun ?",
                "what season do you like best ?", "when do you go outside ?"],
        "tell": ["i feel best in {v} .", "i like to be outside in {v} ."],
        "reply": ["i feel best in {v} , {f} .", "i am happy in {v} . {f} .", "i like to be out in {v} , {f} ."],
        "more": {"why do you like that weather ?": ["well ,", "hmm ,"],
                 "i would rather stay inside .": ["no way ,", "oh no ,"],
                 "that is a good time to be outside .": ["yes ,", "i agree ,"]},
        "values": {
            "spring": ("the tulips come up", "the bees are back",
                       "the first tulips give me hope", "the bees hum again"),
            "summer": ("i wear shorts all day", "i eat ice cream outside",
                       "the days are long", "ice cream tastes better then"),
            "the fall": ("the leaves turn gold", "i jump into piles of leaves",
                         "the pumpkins are ripe then", "i pick pumpkins and apples"),
            "winter": ("i wear my mittens", "i skate on the frozen pond",
                       "the cold air wakes me up", "warm mittens are so cozy"),
            "the rain": ("i jump in puddles", "i never need an umbrella",
                         "the drops on the roof sound nice", "puddles are for jumping"),
            "a thunder storm": ("i count after each flash", "the loud boom thrills me",
                                "each flash lights up the sky", "the boom makes me feel alive"),
            "thick fog": ("the world gets so quiet", "everything looks like a ghost",
                          "i feel like a ghost in it", "it hides the world from me"),
            "strong wind": ("i fly my kite", "it messes up my hair",
                            "my kite goes up so high", "messy hair suits me"),
            "the heat": ("i never sweat", "i wear a big straw hat",
                         "my straw hat keeps me safe", "i hate to be cold"),
            "deep snow": ("i build a snowman", "i pull out my sled",
                          "the sled goes so fast", "a snowman makes kids laugh"),
        },
    },
    "movies": {
        "persona": ["i like to watch {v} .", "i am a fan of {v} .", "i watch {v} every night ."],
        "ask": ["what movies do you like ?", "do you watch a lot of tv ?", "what do you like to watch ?",
                "seen any good movies ?", "what is your favorite kind of movie ?"],
        "tell": ["i like to watch {v} .", "i am a fan of {v} ."],
        "reply": ["i watch {v} , {f} .", "i am a fan of {v} . {f} .", "i like {v} , {f} ."],
        "more": {"which one should i watch first ?": ["any of them ,", "an old one ,"],
                 "do you watch them alone ?": ["yes ,", "mostly ,"],
                 "i should watch one of those .": ["you should ,", "yes ,"]},
        "values": {
            "westerns": ("the sheriff always wins", "i like a good duel at noon",
                         "the outlaws make me laugh", "the sheriff is so cool"),
            "scary films": ("the zombies are great", "i scream all the time",
                            "i hide behind a pillow", "the zombies are not real"),
            "love stories": ("i cry at every kiss", "they always end with a kiss",
                             "i need a box of tissues", "the last kiss gets me"),
            "space films": ("i like aliens and lasers", "the robots are so clever",
                            "the rockets look so real", "the aliens are cute"),
            "cartoons": ("i am a child at heart", "the talking mice are funny",
                         "the drawings are so pretty", "you are never too old for talking mice"),
            "spy films": ("the gadgets are so cool", "i like secret agents",
                          "the agent always gets away", "the secret codes are fun"),
            "nature films": ("the whales amaze me", "i learn about penguins",
                             "the penguins are so brave", "the whales sing so well"),
            "musicals": ("i sing along", "the actors tap dance",
                         "the tap dance scenes are the best", "i know each song by heart"),
            "pirate films": ("i like the sword fights", "they look for treasure",
                             "the captain has a wooden leg", "the sword fights are wild"),
            "crime shows": ("i guess the killer first", "the detective is so smart",
                            "the clues are hard to find", "the detective never smiles"),
        },
    },
    "drink": {
        "persona": ["my favorite drink is {v} .", "i drink a lot of {v} .", "i start the day with {v} ."],
        "ask": ["what do you like to drink ?", "what is your favorite drink ?",
                "are you thirsty ? what can i get you ?",
                "what do you drink in the morning ?"],
        "tell": ["i drink a lot of {v} .", "my favorite drink is {v} ."],
        "reply": ["i drink {v} , {f} .", "my favorite drink is {v} . {f} .", "{v} for me , {f} ."],
        "more": {"how much do you drink ?": ["three glasses a day ,", "quite a lot ,"],
                 "is that healthy ?": ["i think so ,", "who knows ,"],
                 "i could use a glass of that .": ["me too ,", "here you go ,"]},
        "values": {
            "coffee": ("i grind the beans myself", "it wakes me up",
                       "i can not wake up without it", "the beans are fresh"),
            "mint tea": ("i let it steep for long", "i pick the leaves myself",
                         "i have my own tea pot", "fresh leaves calm the stomach"),
            "hot cocoa": ("i want marshmallows in it", "it warms me up",
                          "two marshmallows per cup is my rule", "it is like a warm hug"),
            "lemonade": ("i like it sour", "i squeeze the lemons myself",
                         "sour things make me smile", "fresh lemons never let me down"),
            "orange juice": ("it is full of vitamins", "i like it with pulp",
                             "the vitamins keep colds away", "i never buy it without pulp"),
            "milk": ("it is good for my bones", "i dip cookies in it",
                     "my bones are strong", "it goes well with cookies"),
            "apple cider": ("i get it from the orchard", "i press it myself",
                            "the orchard makes it fresh", "i own a big wooden press"),
            "banana shakes": ("my blender is loud", "i add a spoon of honey",
                              "my blender never rests", "fruit and honey are good for me"),
            "water": ("it has no sugar", "i fill my bottle at the tap",
                      "no sugar and no calories", "the tap is free"),
            "ginger ale": ("the bubbles tickle my nose", "i like the fizz",
                           "the fizz helps when i feel sick", "bubbles cheer me up"),
        },
    },
    "dream": {
        "persona": ["my dream is to {v} .", "one day i want to {v} .", "i hope to {v} soon ."],
        "ask": ["what is your dream ?", "what do you want to do one day ?", "what are your plans for the future ?",
                "do you have a big dream ?", "any goals for the future ?"],
        "tell": ["my dream is to {v} .", "one day i want to {v} ."],
        "reply": ["i want to {v} , {f} .", "my dream is to {v} . {f} .", "one day i will {v} , {f} ."],
        "more": {"i hope your dream comes true .": ["thanks ,", "me too ,"],
                 "when will you do it ?": ["next year ,", "soon ,"],
                 "that is a great goal .": ["thank you ,", "it is ,"]},
        "values": {
            "open a bookshop": ("it will have cozy chairs", "i found a store to rent",
                                "i save for the rent", "you can sit in a cozy chair and read there"),
            "sail around the world": ("i am building a boat", "i can read the wind and stars",
                                      "the boat is half done", "the wide ocean calls me"),
            "write a novel": ("i have two chapters", "it is about a lost queen",
                              "i just need a good ending", "i type a page each day"),
            "fly a plane": ("i take pilot lessons", "i am not afraid of heights",
                            "my pilot lessons go well", "i love the view of the clouds"),
            "visit the moon": ("i want to float", "i would wave at the earth",
                               "i train to be an astronaut", "i built a toy rocket"),
            "win the lottery": ("i pick the same numbers", "i buy a ticket every week",
                                "i feel lucky this week", "i know my numbers will come"),
            "build a house": ("i drew the plans myself", "i have bricks already",
                              "the bricks are on the way", "the plans are on my desk"),
            "speak ten languages": ("i know four now", "i study words at night",
                                    "spanish is almost done", "my german is not so bad"),
            "act in a play": ("i learn my lines", "the stage calls me",
                              "i love the lights on stage", "i practice lines in the mirror"),
            "plant a forest": ("i have a thousand seeds", "the earth needs more trees",
                               "the seeds are in pots now", "the trees will outlive me"),
        },
    },
}

# Small talk is rare, because it does not depend on the persona and teaches nothing about it.
GREETINGS = {"hi , how are you ?": ["i am fine , thanks !", "hi ! i am doing well .", "i am great today !"],
             "hello , how was your day ?": ["it was good , thanks !", "hello ! it was fine .", "not bad at all !"]}
GOODBYES = {"i have to go , bye !": ["bye , talk to you soon !", "goodbye , take care !"],
            "it was nice to meet you .": ["nice to meet you too !", "same here , have a good night !"]}
HELLO = ["hi !", "hello !", "hey there !"]                                  # before the first question
REACTIONS = ["nice !", "cool .", "oh wow .", "that is great .", "i see ."]   # before a later question
RETURN = ["what about you ?", "how about you ?", "and you ?"]

N_TRAIN, N_VALID = 465, 50
CANDIDATES = {"train": 2, "valid": 20}


def pick(rng, options, used):
    """Choose among the least used options; a plain random choice would leave some facts out of `train`."""
    least = min(used[option] for option in options)
    choice = rng.choice([option for option in options if used[option] == least])
    used[choice] += 1
    return choice


def draw_persona(rng, seen, used):
    """Draw four or five values of different topics as {topic: value}, never the same set twice per file."""
    while True:
        topics = rng.sample(sorted(TOPICS), rng.choice([4, 4, 5]))
        persona = {topic: pick(rng, list(TOPICS[topic]["values"]), used) for topic in topics}
        key = frozenset(persona.items())
        if key not in seen:
            seen.add(key)
            return persona


def plan_dialog(rng, persona):
    """Plan the turns as a list of (kind, topic), where a "more" always comes right after its "main"."""
    n_turns = rng.choices([4, 5, 6], weights=[6, 3, 1])[0]
    n_main = min(len(persona), n_turns - rng.choice([1, 1, 2]))
    main = rng.sample(sorted(persona), n_main)
    spare = n_turns - n_main
    hello = spare > 0 and rng.random() < 0.15
    bye = spare > hello and rng.random() < 0.1
    followed = rng.sample(main, min(n_main, spare - hello - bye))
    plan = [("hello", None)] if hello else []
    for topic in main:
        plan += [("main", topic), ("more", topic)] if topic in followed else [("main", topic)]
    return plan + ([("bye", None)] if bye else [])


def make_dialog(rng, persona, used):
    """Return (persona sentences, turns); a turn is (user utterance, bot reply, label of the topic and value)."""
    turns, owed = [], None      # owed: the topic on which the bot has just asked the user's opinion
    plan = plan_dialog(rng, persona)
    for i, (kind, topic) in enumerate(plan):
        if kind in ("hello", "bye"):
            user, replies = rng.choice(list((GREETINGS if kind == "hello" else GOODBYES).items()))
            reply, label = rng.choice(replies), kind
        else:
            table, value = TOPICS[topic], persona[topic]
            facts = table["values"][value]
            label = (topic, value)
        told = False
        if kind == "more":
            user, openings = rng.choice(list(table["more"].items()))
            reply = f"{rng.choice(openings)} {pick(rng, facts[2:], used)} .".strip()
        elif kind == "main":
            told = owed is None and rng.random() < 0.25
            if told:        # the user states his own value, which is not the bot's
                user = f"{tell(rng, topic, value)} {rng.choice(RETURN)}"
            else:
                user = rng.choice(table["ask"])
            reply = rng.choice(table["reply"]).format(v=value, f=pick(rng, facts[:2], used))
        if owed:
            user = f"{tell(rng, owed, persona[owed])} {user}"
        elif kind == "main" and rng.random() < 0.4:
            user = f"{rng.choice(REACTIONS if i else HELLO)} {user}"
        # The bot asks back only if the plan leaves room for an answer in the user's next utterance.
        owed = topic if kind == "main" and not told and plan[i + 1:i + 2] != [("more", topic)] \
            and i + 1 < len(plan) and rng.random() < 0.3 else None
        if owed:
            reply = f"{reply} {rng.choice(RETURN)}"
        turns.append((user, reply, label))
    sentences = [rng.choice(TOPICS[topic]["persona"]).format(v=value) for topic, value in persona.items()]
    return sentences, turns


def tell(rng, topic, not_value):
    """Let the user state his own value, which differs from the bot's."""
    value = rng.choice([v for v in TOPICS[topic]["values"] if v != not_value])
    return rng.choice(TOPICS[topic]["tell"]).format(v=value)


def make_split(rng, n_dialogs, n_candidates, seen, used):
    """Make entries in PERSONA-CHAT's form, with distractors from other dialogs of the split."""
    dialogs = [make_dialog(rng, draw_persona(rng, seen, used), used) for _ in range(n_dialogs)]
    pool = [(reply, label, d) for d, (_, turns) in enumerate(dialogs) for _, reply, label in turns]
    entries = []
    for d, (sentences, turns) in enumerate(dialogs):
        history, utterances = [], []
        own = {reply for _, reply, _ in turns}
        for user, gold, label in turns:
            history = history + [user]
            distractors = set()
            while len(distractors) < n_candidates - 1:
                reply, other_label, other_d = rng.choice(pool)
                # Another answer about the same value would be just as right, so it is no distractor.
                if other_d != d and other_label != label and reply not in own:
                    distractors.add(reply)
            candidates = sorted(distractors)    # sets have no fixed order between runs
            rng.shuffle(candidates)
            utterances.append({"history": history, "candidates": candidates + [gold]})
            history = history + [gold]
        entries.append({"personality": sentences, "utterances": utterances})
    return entries


def strings_of(data):
    """Return all strings in nested dicts and lists; keys are not text."""
    if isinstance(data, str):
        return [data]
    parts = data.values() if isinstance(data, dict) else data
    return [string for part in parts for string in strings_of(part)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=whole_number, default=42)
    # A tiny model cannot learn to distinguish all values in two minutes; a larger model can. Fewer than 5 topics of 3
    # values would make fewer personas than the file has dialogs.
    parser.add_argument("--topics", type=Number(int, 5, 14), default=7, help="how many of the 14 topics, at least 5 "
                        "(default: %(default)s)")
    parser.add_argument("--values", type=Number(int, 3, 10), default=5, help="how many of their 10 values, at least 3 "
                        "(default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for topic in list(TOPICS)[args.topics:]:
        del TOPICS[topic]
    for table in TOPICS.values():
        table["values"] = dict(list(table["values"].items())[:args.values])

    rng, seen, used = random.Random(args.seed), set(), Counter()
    data = {"train": make_split(rng, N_TRAIN, CANDIDATES["train"], seen, used),
            "valid": make_split(rng, N_VALID, CANDIDATES["valid"], seen, used)}

    # One dialog per line without spaces: the file is small, and a diff still shows which dialogs changed.
    lines = {split: ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in data[split]) for split in data}
    text = '{"train":[\n' + lines["train"] + '\n],"valid":[\n' + lines["valid"] + "\n]}\n"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="ascii")

    words = set(" ".join(strings_of(data)).split())
    for split, entries in data.items():
        n_turns = sum(len(entry["utterances"]) for entry in entries)
        print(f"{split}: {len(entries)} dialogs, {n_turns} turns, {CANDIDATES[split]} candidates each")
    print(f"{len(words)} word types, {len(text)} bytes in {args.out}")


if __name__ == "__main__":
    command(main)
