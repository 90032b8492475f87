"""The wording of the sample data: passage sentences, question phrasings and English country names. Data only.

Placeholders are facts of one airport (see `airports.load_airports`) and two ways to mention it: `{s}` opens a
sentence (its name, "It" or "The airport"), `{airport}` stands inside one (its name, "the airport").
"Listed" means in this sample: the nearest airport of the sample need not be the nearest of the world.
"""

# A passage is one layout with its groups shuffled, one sentence per group. Unknown facts drop out.
PLACE, CODES, NEAREST = ("city", "region", "country"), ("code", "iata"), ("nearest", "distance")
LAYOUTS = (
    (PLACE, CODES, ("elevation",), ("time_zone",), NEAREST),
    (PLACE, ("code",), ("iata",), ("elevation", "time_zone"), NEAREST),
    ((*PLACE, "elevation"), CODES, ("time_zone",), NEAREST),
    (("city",), ("region", "country"), CODES, ("elevation", "time_zone"), NEAREST),
    (("city", "elevation"), ("region", "country"), CODES, ("time_zone",), NEAREST),
    (("city", "elevation"), ("region", "country", "time_zone"), ("code",), ("iata",), NEAREST),
    (("city", "code"), ("region", "country"), ("iata",), ("elevation",), ("time_zone",), NEAREST),
)
EXTRAS = (("coordinates",), ("hemisphere",))  # where a passage would be too short, and now and then elsewhere

SENTENCES = {
    ("city", "region", "country"): (
        "{s} is located in {city}, {region}, {country}.",
        "{s} serves {city} in {region}, {country}.",
        "{s} can be found at {city} in {region}, a part of {the_country}.",
        "Travellers to {city} in {region}, {country}, can use {airport}.",
        "The city of {airport} is {city}, in {region}, {country}.",
    ),
    ("city", "country"): (
        "{s} is located in {city}, {country}.",
        "{s} serves {city} in {the_country}.",
        "{s} can be found at {city}, a part of {the_country}.",
        "Travellers to {city} in {the_country} can use {airport}.",
    ),
    ("city",): (
        "{s} serves {city}.",
        "{s} lies at or close to {city}.",
        "The place served by {airport} is {city}.",
        "Travellers to {city} can use {airport}.",
    ),
    ("city", "elevation"): (
        "{s} serves {city} and lies {elevation} feet above sea level.",
        "{s} is located at {city}, at an elevation of {elevation} feet.",
        "At {elevation} feet above sea level, {airport} serves {city}.",
        "The place served by {airport} is {city}, and the elevation is {elevation} feet.",
    ),
    ("city", "code"): (
        "{s} serves {city} and has the {code_kind} {code}.",
        "{s} is located at {city}; the {code_kind} is {code}.",
        "With the {code_kind} {code}, {airport} serves {city}.",
        "The {code_kind} {code} stands for {airport}, which is found at {city}.",
    ),
    ("city", "region", "country", "elevation"): (
        "{s} is located in {city}, {region}, {country}, at an elevation of {elevation} feet.",
        "{s} serves {city} in {region}, {country}, and lies {elevation} feet above sea level.",
        "At {elevation} feet above sea level, {airport} serves {city} in {region}, {country}.",
        "Travellers to {city} in {region}, {country}, can use {airport}, elevation {elevation} feet.",
    ),
    ("city", "country", "elevation"): (
        "{s} is located in {city}, {country}, at an elevation of {elevation} feet.",
        "{s} serves {city} in {the_country} and lies {elevation} feet above sea level.",
        "At {elevation} feet above sea level, {airport} serves {city} in {the_country}.",
    ),
    ("region", "country"): (
        "{s} belongs to {region} in {the_country}.",
        "{s} lies in {region}, {country}.",
        "The surrounding region of {airport} is {region} in {the_country}.",
        "On a map of {the_country}, {airport} appears in {region}.",
    ),
    ("country",): (
        "{s} lies in {the_country}.",
        "{s} is one of the airports of {the_country}.",
        "The country of {airport} is {the_country}.",
        "On a map of the world, {airport} appears in {the_country}.",
    ),
    ("region", "country", "time_zone"): (
        "{s} belongs to {region} in {the_country} and keeps {time_zone} time.",
        "{s} lies in {region}, {country}, in the {time_zone} time zone.",
        "The surrounding region of {airport} is {region} in {the_country}, where clocks follow {time_zone}.",
        "The time zone of {airport} is {time_zone}, as it lies in {region}, {country}.",
    ),
    ("country", "time_zone"): (
        "{s} lies in {the_country} and keeps {time_zone} time.",
        "{s} is in the {time_zone} time zone, in {the_country}.",
        "The country of {airport} is {the_country}, and its clocks follow {time_zone}.",
    ),
    ("code", "iata"): (
        "{s} has the {code_kind} {code} and the IATA code {iata}.",
        "The {code_kind} of {airport} is {code}, while the IATA code is {iata}.",
        "Airlines know {airport} by the IATA code {iata}; the {code_kind} is {code}.",
        "For {airport}, the IATA code is {iata} and the {code_kind} is {code}.",
        "{s} is listed under the IATA code {iata} and under the {code_kind} {code}.",
    ),
    ("code",): (
        "The {code_kind} of {airport} is {code}.",
        "{s} has the {code_kind} {code}.",
        "Charts mark {airport} with the {code_kind} {code}.",
        "{s} uses {code} as its {code_kind}.",
    ),
    ("iata",): (
        "The IATA code of {airport} is {iata}.",
        "{s} has the IATA code {iata}.",
        "Baggage tags for {airport} carry the IATA code {iata}.",
        "Airlines know {airport} by the IATA code {iata}.",
    ),
    ("elevation",): (
        "{s} lies {elevation} feet above sea level.",
        "{s} sits at an elevation of {elevation} feet.",
        "The elevation of {airport} is {elevation} feet.",
        "At {airport}, the ground is {elevation} feet above sea level.",
    ),
    ("elevation", "time_zone"): (
        "{s} sits {elevation} feet above sea level and keeps {time_zone} time.",
        "Clocks at {airport} follow {time_zone}, and the elevation is {elevation} feet.",
        "The elevation of {airport} is {elevation} feet and the time zone is {time_zone}.",
        "{s} is in the {time_zone} time zone, at an elevation of {elevation} feet.",
    ),
    ("time_zone",): (
        "{s} is in the {time_zone} time zone.",
        "{s} keeps {time_zone} time.",
        "Clocks at {airport} follow the {time_zone} time zone.",
        "The time zone of {airport} is {time_zone}.",
        "Local time at {airport} is that of {time_zone}.",
    ),
    ("nearest", "distance"): (
        "{s} is {distance} km from {nearest}, the nearest other airport listed.",
        "{s} has {nearest} as its nearest listed neighbour, {distance} km away.",
        "{s} has no listed neighbour closer than {nearest}, {distance} km away.",
        "The nearest listed airport to {name} is {nearest}, {distance} km away.",
        "{nearest} is the closest listed airport to {name}, at a distance of {distance} km.",
        "Among the other listed airports, {nearest} is the closest to {name}, {distance} km off.",
    ),
    ("coordinates",): (
        "The coordinates of {airport} are {coordinates}.",
        "{s} lies at {coordinates}.",
        "{s} is positioned at {coordinates}.",
        "On the map, {airport} is found at {coordinates}.",
    ),
    ("hemisphere",): (
        "Seen from the equator, {airport} lies in the {hemisphere} hemisphere.",
        "{s} is one of the listed airports of the {hemisphere} hemisphere.",
        "The runway of {airport} lies in the {hemisphere} hemisphere.",
    ),
}

# {airport} is the name, with "in <city, region or country>" where the name alone would be ambiguous.
QUESTIONS = {
    "country": (
        "In which country is {airport}?",
        "Which country is {airport} located in?",
        "What country does {airport} belong to?",
        "{airport} is in which country?",
        "Name the country where {airport} is found.",
    ),
    "city": (
        "Which city does {airport} serve?",
        "What city or town is {airport} located in?",
        "{airport} serves which place?",
        "Name the city or town served by {airport}.",
        "What is the name of the place served by {airport}?",
    ),
    "region": (
        "In which region or state is {airport}?",
        "Which state, province or region does {airport} belong to?",
        "What region is {airport} located in?",
        "{airport} lies in which state or region?",
        "Name the region where {airport} is found.",
    ),
    "iata": (
        "What is the IATA code of {airport}?",
        "Which IATA code does {airport} have?",
        "Which IATA code do airlines use for {airport}?",
        "{airport} has which IATA code?",
        "Give the IATA code of {airport}.",
    ),
    "code": (
        "What is the {code_kind} of {airport}?",
        "Which {code_kind} does {airport} have?",
        "Under which {code_kind} is {airport} listed?",
        "{airport} uses which {code_kind}?",
        "Give the {code_kind} of {airport}.",
    ),
    "elevation": (
        "What is the elevation of {airport} in feet?",
        "How many feet above sea level is {airport}?",
        "How high is {airport}, in feet?",
        "At what elevation in feet does {airport} sit?",
        "{airport} lies how many feet above sea level?",
    ),
    "time_zone": (
        "What is the time zone of {airport}?",
        "Which time zone is {airport} in?",
        "What time zone do clocks at {airport} follow?",
        "{airport} keeps the time of which time zone?",
        "Name the time zone used at {airport}.",
    ),
    "nearest": (
        "Which listed airport is nearest to {airport}?",
        "What is the closest listed airport to {airport}?",
        "Which other airport on the list is closest to {airport}?",
        "What is the nearest listed neighbour of {airport}?",
        "Name the listed airport nearest to {airport}.",
    ),
    "distance": (
        "How many km is it from {airport} to the nearest listed airport?",
        "How far, in km, is the closest listed airport from {airport}?",
        "What is the distance in km between {airport} and its nearest listed neighbour?",
        "{airport} is how many km from the nearest other airport on the list?",
        "Give the distance in km from {airport} to the nearest listed airport.",
    ),
    "name_by_code": (
        "Which airport has the {code_kind} {code}?",
        "What is the name of the airport with the {code_kind} {code}?",
        "{code} is the {code_kind} of which airport?",
        "Which airport uses {code} as its {code_kind}?",
        "Name the airport whose {code_kind} is {code}.",
    ),
    "name_by_iata": (
        "Which airport has the IATA code {iata}?",
        "What is the name of the airport with the IATA code {iata}?",
        "{iata} is the IATA code of which airport?",
        "Which airport do airlines know by the IATA code {iata}?",
        "Name the airport whose IATA code is {iata}.",
    ),
}

# Where the CLDR name reads like a table entry, a plain one; all others come from Babel.
COUNTRY_NAMES = {
    "CD": "Democratic Republic of the Congo",
    "CG": "Republic of the Congo",
    "HK": "Hong Kong",
    "MM": "Myanmar",
    "MO": "Macao",
    "TR": "Turkey",
    "UM": "United States Minor Outlying Islands",
}
COUNTRIES_WITH_ARTICLE = frozenset(
    ("AE", "BQ", "BS", "CC", "CD", "CF", "CG", "CK", "DO", "FK", "FO", "GB", "IM", "IO")
    + ("KM", "KY", "MH", "MP", "MV", "NL", "PH", "SB", "SC", "TC", "UM", "US", "VG")
)
COUNTRY_ALIASES = {
    "CI": ["Ivory Coast"],
    "CV": ["Cabo Verde"],
    "CZ": ["Czech Republic"],
    "GB": ["UK"],
    "MM": ["Burma"],
    "SZ": ["Swaziland"],
    "TR": ["Türkiye"],
    "US": ["United States of America", "USA"],
}
