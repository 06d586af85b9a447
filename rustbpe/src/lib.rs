//! The Python face of the trainer; the work is done in `split` and `train`.

mod split;
mod train;

use std::time::{Duration, Instant};

use hashbrown::HashMap;
use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyBytes, PyString};

use split::{DEFAULT_PATTERN, Splitter};
use train::{Pair, WordCounter};

/// A batch of texts is counted at this size even if it holds fewer than `buffer_size` of them, so
/// that a large `buffer_size` neither keeps the corpus in memory nor leaves Ctrl-C unanswered.
const BATCH_BYTES: usize = 64 << 20;

/// Python hears from us this often: its signal handlers, and the caller's `progress`.
const BEAT: Duration = Duration::from_millis(50);

struct Progress {
    callback: Option<Py<PyAny>>,
    last: Instant,
}

impl Progress {
    /// Call this as often as you like; it does something only when a beat has passed.
    fn tick(&mut self, stage: &str, done: usize, total: usize) -> PyResult<()> {
        if self.last.elapsed() < BEAT {
            return Ok(());
        }
        self.last = Instant::now();
        Python::attach(|py| {
            py.check_signals()?;
            self.report(py, stage, done, total)
        })
    }

    fn report(&self, py: Python, stage: &str, done: usize, total: usize) -> PyResult<()> {
        if let Some(callback) = &self.callback {
            callback.call1(py, (stage, done, total))?;
        }
        Ok(())
    }
}

/// A byte-level BPE vocabulary: the 256 bytes, then one token for each merge.
#[pyclass(module = "rustbpe")]
struct Tokenizer {
    pattern: String,
    splitter: Splitter,
    merges: Vec<Pair>,
    ids: HashMap<Pair, u32>,
}

#[pymethods]
impl Tokenizer {
    /// An untrained tokenizer: every byte is a token.
    #[new]
    fn new() -> Self {
        Self {
            pattern: DEFAULT_PATTERN.to_owned(),
            splitter: Splitter::new(DEFAULT_PATTERN).expect("a valid pattern"),
            merges: Vec::new(),
            ids: HashMap::new(),
        }
    }

    /// Learn `vocab_size` - 256 merges (fewer if the texts run out of pairs) from an iterable of
    /// str. The result depends neither on `buffer_size`, the number of texts read before they are
    /// counted in parallel, nor on the number of threads.
    ///
    /// `progress(stage, done, total)` is called about 20 times a second and at the end of each
    /// stage: "count" (texts; total is 0 while unknown), then "merge" (merges). At the end of a
    /// stage done equals total. If it raises, or the iterable does, training stops and the
    /// tokenizer stays as it was.
    #[pyo3(signature = (iterator, vocab_size, buffer_size=8192, pattern=None, progress=None))]
    fn train_from_iterator(
        slf: &Bound<'_, Self>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: i64,
        buffer_size: i64,
        pattern: Option<&str>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        let py = slf.py();
        let Some(wanted) = u32::try_from(vocab_size)
            .ok()
            .and_then(|v| v.checked_sub(256))
        else {
            let message = "vocab_size: expected 256 (the bytes) to 2**32 - 1, got";
            return Err(PyValueError::new_err(format!("{message} {vocab_size}")));
        };
        let Some(buffer_size) = usize::try_from(buffer_size).ok().filter(|&size| size > 0) else {
            let message = "buffer_size: expected at least 1, got";
            return Err(PyValueError::new_err(format!("{message} {buffer_size}")));
        };
        if iterator.is_instance_of::<PyString>() {
            let message = "iterator: expected an iterable of str, got a single str";
            return Err(PyTypeError::new_err(message));
        }
        let pattern = pattern.unwrap_or(DEFAULT_PATTERN);
        let splitter = Splitter::new(pattern).map_err(pattern_error)?;
        let counter = WordCounter::new(splitter.clone())
            .map_err(|error| PyRuntimeError::new_err(error.to_string()))?;
        let mut progress = Progress {
            callback: progress,
            last: Instant::now(),
        };

        // The texts are borrowed from Python, not copied, and counted with the GIL released.
        let mut texts: Vec<PyBackedStr> = Vec::new();
        let (mut bytes, mut read) = (0, 0);
        for item in iterator.try_iter()? {
            let text = text_of(&item?, read)?;
            read += 1;
            bytes += text.len();
            texts.push(text);
            if texts.len() >= buffer_size || bytes >= BATCH_BYTES {
                py.detach(|| counter.add(&texts)).map_err(pattern_error)?;
                texts.clear();
                bytes = 0;
            }
            progress.tick("count", read, 0)?;
        }
        py.detach(|| counter.add(&texts)).map_err(pattern_error)?;
        drop(texts);
        progress.report(py, "count", read, read)?;

        let wanted = wanted as usize;
        let tick = |done| progress.tick("merge", done, wanted);
        let merges = py.detach(|| train::learn_merges(counter.finish(), wanted, tick))?;
        progress.report(py, "merge", merges.len(), merges.len())?;

        let mut this = slf.try_borrow_mut()?;
        this.pattern = pattern.to_owned();
        this.splitter = splitter;
        this.ids = merges.iter().copied().zip(256..).collect();
        this.merges = merges;
        Ok(())
    }

    /// The regular expression that cuts text into words before any merge.
    fn get_pattern(&self) -> &str {
        &self.pattern
    }

    /// (bytes, rank) of every token: the 256 bytes, then the merges in the order learnt.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, usize)> {
        let mut tokens: Vec<Vec<u8>> = (0..=u8::MAX).map(|byte| vec![byte]).collect();
        for &pair in &self.merges {
            let (left, right) = train::unpair(pair);
            tokens.push([&*tokens[left as usize], &*tokens[right as usize]].concat());
        }
        let tokens = tokens.iter().map(|token| PyBytes::new(py, token));
        tokens.zip(0..).collect()
    }

    /// The token ids of a text. For checks and experiments: tiktoken, given the ranks, is faster.
    fn encode(&self, text: &str) -> PyResult<Vec<u32>> {
        let mut tokens = Vec::new();
        let emit = |word: &str| tokens.extend(train::encode_word(word.as_bytes(), &self.ids));
        self.splitter.split(text, emit).map_err(pattern_error)?;
        Ok(tokens)
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        256 + self.merges.len()
    }
}

fn text_of(item: &Bound<'_, PyAny>, position: usize) -> PyResult<PyBackedStr> {
    let Ok(text) = item.cast::<PyString>() else {
        let message = format!(
            "item {position}: expected str, got {}",
            item.get_type().name()?
        );
        return Err(PyTypeError::new_err(message));
    };
    PyBackedStr::try_from(text.clone()).map_err(|cause| {
        let message = format!("item {position}: not encodable as UTF-8 (a lone surrogate?)");
        let error = PyValueError::new_err(message);
        error.set_cause(item.py(), Some(cause));
        error
    })
}

fn pattern_error(error: fancy_regex::Error) -> PyErr {
    PyValueError::new_err(format!("pattern: {error}"))
}

#[pymodule]
fn rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Tokenizer>()
}
