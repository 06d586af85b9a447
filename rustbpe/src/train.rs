//! Counting words, and learning merges from the counts.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use compact_str::CompactString;
use hashbrown::HashMap;
use hashbrown::hash_map::Entry;
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};

use crate::split::Splitter;

/// How often each word occurs. Nearly all words fit a `CompactString` without an allocation.
pub type WordCounts = HashMap<CompactString, u64>;

/// Counts the words of batch after batch of texts on all cores.
pub struct WordCounter {
    splitter: Splitter,
    /// Our own threads, not rayon's global ones: those would be dead in a child that Python forks
    /// after a training, and the child's training would wait for them for ever.
    pool: ThreadPool,
    /// A table for each thread, kept from batch to batch and summed once at the end. No two
    /// threads ever want the same one, so the locks are free.
    counts: Vec<Mutex<WordCounts>>,
}

impl WordCounter {
    pub fn new(splitter: Splitter) -> Result<Self, ThreadPoolBuildError> {
        let pool = ThreadPoolBuilder::new().build()?;
        let counts = (0..pool.current_num_threads())
            .map(|_| Mutex::default())
            .collect();
        Ok(Self {
            splitter,
            pool,
            counts,
        })
    }

    pub fn add<T>(&self, texts: &[T]) -> Result<(), fancy_regex::Error>
    where
        T: std::ops::Deref<Target = str> + Sync,
    {
        let next = AtomicUsize::new(0);
        let results = self.pool.broadcast(|thread| {
            // A clone has scratch memory of its own, which threads would otherwise fight over.
            let splitter = self.splitter.clone();
            let mut counts = self.counts[thread.index()].lock().expect("no panic before");
            while let Some(text) = texts.get(next.fetch_add(1, Ordering::Relaxed)) {
                splitter.split(text, |word| match counts.get_mut(word) {
                    Some(count) => *count += 1,
                    None => _ = counts.insert(word.into(), 1),
                })?;
            }
            Ok(())
        });
        results.into_iter().collect()
    }

    pub fn finish(self) -> WordCounts {
        let tables = self.counts.into_par_iter();
        let tables = tables.map(|counts| counts.into_inner().expect("no panic before"));
        self.pool.install(|| {
            tables.reduce(WordCounts::new, |a, b| {
                let (mut large, small) = if a.len() < b.len() { (b, a) } else { (a, b) };
                for (word, count) in small {
                    *large.entry(word).or_insert(0) += count;
                }
                large
            })
        })
    }
}

/// Two adjacent tokens, the left one in the upper half: a number that hashes fast and sorts by
/// (left, right).
pub type Pair = u64;

pub const fn pair(left: u32, right: u32) -> Pair {
    (left as u64) << 32 | right as u64
}

pub const fn unpair(pair: Pair) -> (u32, u32) {
    ((pair >> 32) as u32, pair as u32)
}

/// A distinct word: where its tokens lie in `Merger::tokens`, and how often it occurs.
struct Word {
    start: usize,
    len: usize,
    count: u64,
}

#[derive(Default)]
struct PairUse {
    /// Occurrences in the corpus, every adjacent place counted: "aaaa" has three of (a, a).
    count: u64,
    /// The words that have the pair, ascending. A word stays listed when it loses the pair.
    words: Vec<u32>,
}

impl PairUse {
    fn add(&mut self, word: u32, count: u64) {
        self.count += count;
        if self.words.last() != Some(&word) {
            self.words.push(word);
        }
    }
}

struct Merger {
    tokens: Vec<u32>,
    words: Vec<Word>,
    pairs: HashMap<Pair, PairUse>,
}

impl Merger {
    fn new(counts: WordCounts) -> Self {
        let mut merger = Self {
            tokens: Vec::new(),
            words: Vec::new(),
            pairs: HashMap::new(),
        };
        for (text, count) in counts {
            if text.len() < 2 {
                continue;
            }
            let word = u32::try_from(merger.words.len()).expect("fewer than 2^32 distinct words");
            for both in text.as_bytes().windows(2) {
                let pair = pair(both[0].into(), both[1].into());
                merger.pairs.entry(pair).or_default().add(word, count);
            }
            let start = merger.tokens.len();
            merger.tokens.extend(text.bytes().map(u32::from));
            merger.words.push(Word {
                start,
                len: text.len(),
                count,
            });
        }
        merger
    }

    /// Replaces (left, right) by `new` everywhere and returns the pairs that this brought into
    /// being. They are exactly the pairs with `new` in them, so no other pair's count ever rises,
    /// which is what lets the heap be lazy and each pair's list of words be written only once.
    fn merge(&mut self, target: Pair, new: u32) -> Vec<Pair> {
        let (left, right) = unpair(target);
        let mut created = Vec::new();
        // Out of the table before its occurrences are taken apart: they need no bookkeeping.
        let used = self.pairs.remove(&target).unwrap_or_default();
        for index in used.words {
            let word = &mut self.words[index as usize];
            let tokens = &mut self.tokens[word.start..word.start + word.len];
            let (mut read, mut write) = (0, 0);
            while read < tokens.len() {
                if tokens[read] != left || tokens.get(read + 1) != Some(&right) {
                    tokens[write] = tokens[read];
                    (read, write) = (read + 1, write + 1);
                    continue;
                }
                // Each neighbour trades its pair with the old token for one with the new. The left
                // one is read where it was written: it may itself be a merge of a moment ago.
                let before = write.checked_sub(1).map(|i| tokens[i]);
                let after = tokens.get(read + 2).copied();
                let traded = [
                    before.map(|token| (pair(token, left), pair(token, new))),
                    after.map(|token| (pair(right, token), pair(new, token))),
                ];
                for (lost, gained) in traded.into_iter().flatten() {
                    if let Some(used) = self.pairs.get_mut(&lost) {
                        used.count -= word.count;
                    }
                    match self.pairs.entry(gained) {
                        Entry::Occupied(mut used) => used.get_mut().add(index, word.count),
                        Entry::Vacant(slot) => {
                            slot.insert(PairUse::default()).add(index, word.count);
                            created.push(gained);
                        }
                    }
                }
                tokens[write] = new;
                (read, write) = (read + 2, write + 1);
            }
            word.len = write;
        }
        created
    }
}

/// Learns up to `wanted` merges, the most frequent pair first and of equals the lowest, and stops
/// early when no pair is left. The token of merge i is 256 + i. `tick` hears of every merge and
/// may stop the work by an error.
pub fn learn_merges<E>(
    counts: WordCounts,
    wanted: usize,
    mut tick: impl FnMut(usize) -> Result<(), E>,
) -> Result<Vec<Pair>, E> {
    let mut merger = Merger::new(counts);
    let entry = |(&pair, used): (&Pair, &PairUse)| (used.count, Reverse(pair));
    let mut heap: BinaryHeap<_> = merger.pairs.iter().map(entry).collect();
    let mut merges = Vec::new();
    while merges.len() < wanted
        && let Some((count, Reverse(pair))) = heap.pop()
    {
        // The heap is lazy: its counts are those of when the entry was made. Counts only fall, so
        // an entry that is still true is the maximum, and one that is not goes back corrected.
        let current = merger.pairs[&pair].count;
        if current == 0 {
            merger.pairs.remove(&pair);
        } else if current < count {
            heap.push((current, Reverse(pair)));
        } else {
            for created in merger.merge(pair, 256 + merges.len() as u32) {
                heap.push((merger.pairs[&created].count, Reverse(created)));
            }
            merges.push(pair);
            tick(merges.len())?;
        }
    }
    Ok(merges)
}

/// The tokens of one word: the earliest-learnt pair is merged until none is left.
pub fn encode_word(word: &[u8], ids: &HashMap<Pair, u32>) -> Vec<u32> {
    let mut tokens: Vec<u32> = word.iter().map(|&byte| byte.into()).collect();
    let first = |tokens: &[u32]| {
        let pairs = tokens.windows(2).map(|both| pair(both[0], both[1]));
        pairs
            .filter_map(|pair| Some((*ids.get(&pair)?, pair)))
            .min()
    };
    while let Some((new, target)) = first(&tokens) {
        let (mut read, mut write) = (0, 0);
        while read < tokens.len() {
            let found = read + 1 < tokens.len() && pair(tokens[read], tokens[read + 1]) == target;
            tokens[write] = if found { new } else { tokens[read] };
            read += 1 + usize::from(found);
            write += 1;
        }
        tokens.truncate(write);
    }
    tokens
}
