//! Cutting text into the words within which merges happen.
//!
//! Two engines: `fancy_regex` for any pattern, and for GPT-4's and ours a hand-written scanner that
//! gives the same words about an order of magnitude faster (the lookahead and the possessive
//! quantifiers push a regex engine off its fast path, and splitting is most of the work of
//! training). `tests/test_rustbpe.py` holds the scanner to the regex.

use std::sync::LazyLock;

use fancy_regex::Regex;
use regex_syntax::hir::{Class as HirClass, HirKind};

macro_rules! gpt4_pattern {
    ($digits:literal) => {
        concat!(
            r"'(?i:[sdmt]|ll|ve|re)",
            r"|[^\r\n\p{L}\p{N}]?+\p{L}+",
            r"|\p{N}{1,",
            $digits,
            r"}| ?[^\s\p{L}\p{N}]++[\r\n]*",
            r"|\s*[\r\n]",
            r"|\s+(?!\S)",
            r"|\s+",
        )
    };
}

/// GPT-4's pattern.
pub const DEFAULT_PATTERN: &str = gpt4_pattern!("3");

/// The same, but a number is cut after two digits instead of three, which spends fewer of a small
/// vocabulary's tokens on numbers.
pub const SHORT_NUMBERS_PATTERN: &str = gpt4_pattern!("2");

#[derive(Clone)]
pub enum Splitter {
    /// The scanner, for the two patterns above.
    Scanner {
        max_digits: usize,
    },
    Regex(Regex),
}

impl Splitter {
    pub fn new(pattern: &str) -> Result<Self, fancy_regex::Error> {
        Ok(match pattern {
            DEFAULT_PATTERN => Self::Scanner { max_digits: 3 },
            SHORT_NUMBERS_PATTERN => Self::Scanner { max_digits: 2 },
            other => Self::Regex(Regex::new(other)?),
        })
    }

    /// Calls `emit` with every word of `text` in order. What a custom pattern does not match is
    /// left out, as tiktoken does. Only a custom pattern can fail: by backtracking without end.
    pub fn split<'t>(
        &self,
        text: &'t str,
        mut emit: impl FnMut(&'t str),
    ) -> Result<(), fancy_regex::Error> {
        match self {
            &Self::Scanner { max_digits } => {
                let scanner = Scanner::new(text, max_digits);
                let mut start = 0;
                while start < text.len() {
                    let end = scanner.word_end(start);
                    emit(&text[start..end]);
                    start = end;
                }
            }
            Self::Regex(regex) => {
                for found in regex.find_iter(text) {
                    let word = found?.as_str();
                    if !word.is_empty() {
                        emit(word);
                    }
                }
            }
        }
        Ok(())
    }
}

/// The five kinds of character that GPT-4's pattern tells apart.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Class {
    Other,
    Letter,
    Number,
    /// `\s` but for the next two.
    Space,
    /// `\r` and `\n`.
    Newline,
}

/// The class of every code point, read out of the regex engine's own Unicode tables: a second
/// source (such as `char::is_numeric`) could be of another Unicode version.
static CLASSES: LazyLock<Box<[Class]>> = LazyLock::new(|| {
    let mut table = vec![Class::Other; char::MAX as usize + 1].into_boxed_slice();
    for (pattern, class) in [
        (r"\p{L}", Class::Letter),
        (r"\p{N}", Class::Number),
        (r"\s", Class::Space),
        (r"[\r\n]", Class::Newline),
    ] {
        let hir = regex_syntax::parse(pattern).expect("a valid pattern");
        let HirKind::Class(HirClass::Unicode(ranges)) = hir.kind() else {
            unreachable!("{pattern} is a class of characters");
        };
        for range in ranges.ranges() {
            table[range.start() as usize..=range.end() as usize].fill(class);
        }
    }
    table
});

struct Scanner<'t> {
    text: &'t str,
    classes: &'static [Class],
    max_digits: usize,
}

impl<'t> Scanner<'t> {
    fn new(text: &'t str, max_digits: usize) -> Self {
        Self {
            text,
            classes: &CLASSES,
            max_digits,
        }
    }

    /// The class of the character at byte `at` and where the next one begins; None at the end.
    #[inline]
    fn peek(&self, at: usize) -> Option<(Class, usize)> {
        let first = *self.text.as_bytes().get(at)?;
        if first < 0x80 {
            return Some((self.classes[first as usize], at + 1));
        }
        let c = self.text[at..].chars().next()?;
        Some((self.classes[c as usize], at + c.len_utf8()))
    }

    /// Where the run of `class` that begins at byte `at` (it may be empty) ends.
    #[inline]
    fn skip(&self, mut at: usize, class: Class) -> usize {
        while let Some((found, next)) = self.peek(at)
            && found == class
        {
            at = next;
        }
        at
    }

    /// Where the word that begins at `start` ends. The alternatives of the pattern, in its order,
    /// sorted by what the first character lets match; none of them can fail for every character,
    /// so words cover the text without gaps.
    #[inline]
    fn word_end(&self, start: usize) -> usize {
        let (class, second) = self.peek(start).expect("start lies inside the text");
        let next_class = || self.peek(second).map(|(class, _)| class);
        match class {
            Class::Letter => self.skip(second, Class::Letter),
            Class::Number => {
                let mut end = second;
                for _ in 1..self.max_digits {
                    match self.peek(end) {
                        Some((Class::Number, next)) => end = next,
                        _ => break,
                    }
                }
                end
            }
            Class::Other => {
                if let Some(end) = self.contraction_end(start) {
                    end
                } else if next_class() == Some(Class::Letter) {
                    self.skip(second, Class::Letter)
                } else {
                    self.punctuation_end(second)
                }
            }
            Class::Space => match next_class() {
                Some(Class::Letter) => self.skip(second, Class::Letter),
                Some(Class::Other) if self.text.as_bytes()[start] == b' ' => {
                    self.punctuation_end(second)
                }
                _ => self.whitespace_end(start),
            },
            Class::Newline => self.whitespace_end(start),
        }
    }

    /// `'(?i:[sdmt]|ll|ve|re)`.
    fn contraction_end(&self, start: usize) -> Option<usize> {
        let rest = &self.text.as_bytes()[start..];
        let length = match rest {
            [b'\'', a, ..] if b"sdmt".contains(&a.to_ascii_lowercase()) => 2,
            [b'\'', a, b, ..] => match &[a.to_ascii_lowercase(), b.to_ascii_lowercase()] {
                b"ll" | b"ve" | b"re" => 3,
                // U+017F, the long s: an s to whoever ignores case by Unicode's rules.
                [0xC5, 0xBF] => 3,
                _ => return None,
            },
            _ => return None,
        };
        Some(start + length)
    }

    /// The rest of `[^\s\p{L}\p{N}]++[\r\n]*`.
    fn punctuation_end(&self, at: usize) -> usize {
        self.skip(self.skip(at, Class::Other), Class::Newline)
    }

    /// `\s*[\r\n]|\s+(?!\S)|\s+`: through the run's last newline; else the run without its last
    /// character, which goes to the word after it; else, at the end of the text or for a single
    /// character, the whole run.
    fn whitespace_end(&self, start: usize) -> usize {
        let (mut at, mut last, mut after_newline) = (start, start, None);
        while let Some((class @ (Class::Space | Class::Newline), next)) = self.peek(at) {
            if class == Class::Newline {
                after_newline = Some(next);
            }
            (last, at) = (at, next);
        }
        match after_newline {
            Some(end) => end,
            None if at == self.text.len() || last == start => at,
            None => last,
        }
    }
}
