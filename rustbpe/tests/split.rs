//! The hand-written scanner cuts every text as the regular expression does.

#[path = "../src/split.rs"]
mod split;

use proptest::prelude::*;
use split::{DEFAULT_PATTERN, Splitter};

fn words<'t>(splitter: &Splitter, text: &'t str) -> Vec<&'t str> {
    let mut words = Vec::new();
    splitter.split(text, |word| words.push(word)).unwrap();
    words
}

/// The same pattern under another spelling, so that the regex engine runs it.
fn oracle() -> Splitter {
    let splitter = Splitter::new(&format!("(?:{DEFAULT_PATTERN})")).unwrap();
    assert!(matches!(splitter, Splitter::Regex(_)));
    splitter
}

fn check(text: &str) {
    thread_local!(static ORACLE: Splitter = oracle());
    ORACLE.with(|oracle| assert_eq!(words(&Splitter::Default, text), words(oracle, text)));
}

#[test]
fn the_default_pattern_runs_on_the_scanner() {
    let splitter = Splitter::new(DEFAULT_PATTERN).unwrap();
    assert!(matches!(splitter, Splitter::Default));
}

#[test]
fn every_character_has_the_class_that_the_regex_gives_it() {
    // In places where the class shows: after a letter, a digit, a quote, a space, and before them.
    for c in '\0'..=char::MAX {
        check(&format!("a{c}a1{c}1'{c}!{c} {c}  {c}\n{c}"));
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
        text in "[ \t\r\n'sSdlLvVeErR\u{17F}\u{212A}a1２½é漢\u{301}\u{85}\u{A0}\u{2028}\u{3000}\u{200B}!.🎉]{0,24}"
    ) {
        check(&text);
    }

    #[test]
    fn contractions(text in "(['’]|'(?i:s|d|m|t|ll|ve|re|l|v|r)| |x|\n|\u{17F}){0,12}") {
        check(&text);
    }
}
