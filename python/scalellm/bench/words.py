"""Common English words: most tokenizers have each of them, with its space, as one token."""

_TEXT = """
    about above across after again air all also always and animal another answer any are area arm
    around art ask away back bad ball bank base bed been before began best better between big bird
    black blue board boat body book both box boy bring brother brought build built business but buy
    call came can car care carry case cat catch cause cell center century chance change child
    church city class clear close cold college color come common company complete control cost
    could country course cover cross cut dark daughter day dead deal death decide deep did
    different do doctor dog done door down draw dream drive dry during each early earth east easy
    eat economy edge effect eight either end energy enough even evening event ever every example
    experience eye face fact fall family far farm fast father feel feet few field fight figure
    fill film final find fine finger finish fire first fish five floor fly follow food foot for
    force foreign form former forward found four free friend from front full game garden gave
    general girl give glass go god gold gone good government great green ground group grow had
    half hand hang happen happy hard has have head health hear heart heat heavy help her here high
    hill him his history hit hold home hope horse hot hotel hour house how human hundred husband
    idea if image important in inside instead interest into island issue item job join just keep
    kept key kid kill kind king knew know land language large last late law lay lead learn least
    leave left leg less let letter level life light like line list listen little live local long
    look lose loss lost love low machine made main make man many map mark market matter may
    me mean measure meet member memory men middle might mile military mind minute miss model
    modern moment money month more morning most mother mountain mouth move movie much music must
    name nation natural nature near need never new news next night nine no north not note nothing
    now number ocean of off office often oil old on once one only open or order other our out over
    own page paper parent part party pass past pay peace people period person phone picture piece
    place plan plant play point police poor position power present president press price private
    problem process product program public pull push put quality question quick quite race radio
    rain ran rate reach read ready real reason record red region remember report rest result
    return rich right rise river road rock role room rule run safe said same sat save saw say
    school science sea season seat second section see seem sell send sense series serve service
    set seven several shape share she ship short shot should show side sign since sing sister sit
    six size skill skin sleep slow small snow social society some son song soon sort sound source
    south space speak special speech spend sport spring staff stage stand star start state station
    stay step still stock stone stood stop store story street strong student study style such
    summer sun support sure surface system table take talk task tax teach team tell ten test than
    that the their them then there these they thing think third this those though thought three
    through time to today together told too took top total touch toward town trade train travel
    tree trip trouble true try turn two type under unit until up upon us use value very view visit
    voice wait walk wall want war warm was watch water way we weapon wear week weight well went
    were west what when where which while white who whole why wife wild will win wind window
    winter wish with woman wonder wood word work world would write wrong yard year yes yet you
    young your
"""

WORDS: tuple[str, ...] = tuple(_TEXT.split())
