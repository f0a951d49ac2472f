"""What reads like words of the program and stands outside of its catalogue, each with its reason."""

from __future__ import annotations

# Where it stands (a constant, a function, a class or its method) and how it begins, both patterns; and why.
OUTSIDE = (
    # what other programs read
    (
        r".*",
        r"(?:CREATE|SELECT|INSERT|UPDATE|DELETE|DROP|PRAGMA|BEGIN|SAVEPOINT|ROLLBACK|WHERE|WITH) ",
        "SQL",
    ),
    (r"Gaps\.\w+|DeliveryQueue\.retry|_CLOSE_COLUMNS|\w+Reader\.\w+", r".*", "a part of SQL"),
    (r"draw_\w+|_\w+", r"[\"}]*<.*", "HTML and SVG, whose words are values"),
    (r"two", r"<span", "HTML that holds what is in both languages"),
    (r"draw_picture", r"{}><style>", "SVG"),
    (r"draw_page", r"default-src", "the page's security policy"),
    (r"DRAWING_STYLE|PAGE_STYLE", r".*", "CSS"),
    (r"PAGE_SCRIPT", r".*", "JavaScript"),
    (r"_quantile|_counted|dashboard", r"sum |histogram_quantile|label_values", "PromQL"),
    (r"CLOSE_NAMES", r".*", "names of fields in an export"),
    (r"STOPPED|ENDED_WITHOUT_NOTICE|MOVED|DEAF", r".*", "why there is a gap, as other programs read it"),
    (r"Coverage\._new|Coverage\._split|Intake\._refuse", r"str\(why\)|f?'?not stored", "the same"),
    (
        r"STATUS_WORDS|STATES|NO_NEED|Clerk\.__init__|Daemon\._connect_and_serve",
        r".*",
        "states as JSON has them",
    ),
    (r"gather_status|_whole_or_partial", r"no daemon|not connected|not ended", "the same"),
    (r"Feed\._lose|Planner\._instead", r"given up", "the same"),
    (r"PlatformProtocol\.receive", r".*", "what the platform's frames are recognised by"),
    (r"_journal_id|Migration\._what", r".*", "by which something is found again"),
    (r"Metrics\.\w+", r"# TYPE|f'{n}=", "the textfile format"),
    (
        r"_as_sent|BatchPlan\.add_instrument|Directory\.search|(?:_one_of|_url|_proxy)\.parse|Setting\.expected_of",
        r".*",
        "a value on its way in",
    ),
    (r"write_hash", r"module_hash", "the hash, for the file that keeps it"),
    # what is English by its field's custom
    (r"METRICS|LATENCY_HELP", r".*", "HELP of metrics"),
    (r"PANELS|dashboard", r".*", "the dashboard, whose surroundings are Grafana's"),
    # what is recognised: a server's, a library's, argparse's words
    (r"PACKAGE_NAMES|_KEY_TEXTS|_RATE_TEXTS|_REQUEST_TEXTS|REFUSALS", r".*", "the API's answers"),
    (r"STREAM_ERRORS|StreamProtocol\._understand", r".*", "the stream's answers"),
    (r"_LIBRARY_WORDS|SCHEMA_DAMAGED", r".*", "patterns of what libraries say"),
    (r"MongoStore\._away", r"failed validation", "MongoDB's reasons"),
    (r"uri_faults|_unknown_option", r"Unknown option|words\.partition", "pymongo's words"),
    (r"ARGPARSE_WORDS|argparse_words|_refuse_arguments", r".*", "argparse's words"),
    # the log, which is English
    (r"RETRIED|CLOSES|(?:Poller|Intake|Planner|LogThrottle)\.__init__", r".*", "of a LogThrottle"),
    (r"LogThrottle\.over", r"{} tries", "of a LogThrottle"),
    (r"execution_name|execution_line", r".*", "the log's line of an execution"),
    (r"MarkFiles\._object", r"no JSON object", "the reason in a line of the log"),
    # names and numbers
    (r"read_codes", r".*", "an option, and its value"),
    (r"_add_commands", r"stockrt {}", "a name and its version"),
    (r"_caller_origins", r"str\(source\)", "a path"),
    (r"os_words", r"str\(error\)", "the system's words"),
    (
        r".*",
        r"\w+=(?:stockrt\.service|crypto|common|module_hash|stock_data|(?:COLLECT_CODES=)?watch)$",
        "a name",
    ),
    # what is read by nobody
    (r"StreamAction", r".*", "what an action is, for a reader of the source"),
    (r"Proxy\.__repr__", r".*", "for a debugger"),
    # before anything of the catalogue is there
    (r"", r"stockrt needs Python 3\.11", "an older Python could not read it"),
)
