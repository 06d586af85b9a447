//! Cutting text into the words within which merges happen.

use fancy_regex::Regex;

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
pub struct Splitter {
    regex: Regex,
    /// Whether the pattern is one of the two above, and `regex` what `simplified` makes of it.
    simplified: bool,
}

/// The pattern without its lookahead, for which `blank_after` stands in, and without possessive
/// quantifiers, after which nothing could take a character back: several times as fast.
fn simplified(pattern: &str) -> String {
    let greedy = pattern.replace("?+", "?").replace("++", "+");
    greedy.replace(r"|\s+(?!\S)", "")
}

/// Bytes of a word that belong to the next one: of white space that is neither a single character
/// nor at the end of a line or the text, the last character (`\s+(?!\S)`).
fn blank_after(word: &str, at_end: bool) -> usize {
    match word.chars().next_back() {
        Some(last) if last.is_whitespace() && !matches!(last, '\r' | '\n') && !at_end => {
            last.len_utf8() % word.len()
        }
        _ => 0,
    }
}

impl Splitter {
    pub fn new(pattern: &str) -> Result<Self, fancy_regex::Error> {
        let known = [DEFAULT_PATTERN, SHORT_NUMBERS_PATTERN].contains(&pattern);
        let simpler = known.then(|| simplified(pattern));
        Ok(Self {
            regex: Regex::new(simpler.as_deref().unwrap_or(pattern))?,
            simplified: known,
        })
    }

    /// Calls `emit` with every word of `text` in order. What a custom pattern does not match is
    /// left out, as tiktoken does. Only a custom pattern can fail: by backtracking without end.
    pub fn split<'t>(
        &self,
        text: &'t str,
        mut emit: impl FnMut(&'t str),
    ) -> Result<(), fancy_regex::Error> {
        if !self.simplified {
            for found in self.regex.find_iter(text) {
                let word = found?.as_str();
                if !word.is_empty() {
                    emit(word);
                }
            }
            return Ok(());
        }
        let mut start = 0;
        while let Some(found) = self.regex.find_from_pos(text, start)? {
            let end = found.end() - blank_after(found.as_str(), found.end() == text.len());
            emit(&text[start..end]);
            start = end;
        }
        Ok(())
    }
}
