//! The hand-written scanner cuts every text as the regular expression does.

#[path = "../src/split.rs"]
mod split;

use proptest::prelude::*;
use split::{DEFAULT_PATTERN, SHORT_NUMBERS_PATTERN, Splitter};

fn words<'t>(splitter: &Splitter, text: &'t str) -> Vec<&'t str> {
    let mut words = Vec::new();
    splitter.split(text, |word| words.push(word)).unwrap();
    words
}

const SCANNED: [&str; 2] = [DEFAULT_PATTERN, SHORT_NUMBERS_PATTERN];

/// The same pattern under another spelling, so that the regex engine runs it.
fn oracle(pattern: &str) -> Splitter {
    let splitter = Splitter::new(&format!("(?:{pattern})")).unwrap();
    assert!(matches!(splitter, Splitter::Regex(_)));
    splitter
}

fn check(text: &str) {
    thread_local!(static SPLITTERS: [(Splitter, Splitter); 2] =
        SCANNED.map(|pattern| (Splitter::new(pattern).unwrap(), oracle(pattern))));
    SPLITTERS.with(|splitters| {
        for (scanner, oracle) in splitters {
            assert_eq!(words(scanner, text), words(oracle, text));
        }
    });
}

#[test]
fn known_patterns_run_on_the_scanner() {
    for pattern in SCANNED {
        let splitter = Splitter::new(pattern).unwrap();
        assert!(matches!(splitter, Splitter::Scanner { .. }));
    }
}

#[test]
fn every_character_has_the_class_that_the_regex_gives_it() {
    // In places where the class shows: after a letter, a digit, a quote, a space, and before them.
    for c in '\0'..=char::MAX {
        check(&format!("a{c}a1{c}1'{c}!{c} {c}  {c}\n{c}12{c}34"));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn arbitrary_text(text in any::<String>()) {
        check(&text);
    }

    #[test]
    fn text_of_characters_that_matter(
        text in "[ \t\r\n'sSdlLvVeErR\u{17F}\u{212A}a127２½é漢\u{301}\u{85}\u{A0}\u{2028}\u{3000}\u{200B}!.🎉]{0,24}"
    ) {
        check(&text);
    }

    #[test]
    fn contractions(text in "(['’]|'(?i:s|d|m|t|ll|ve|re|l|v|r)| |x|\n|\u{17F}){0,12}") {
        check(&text);
    }
}
