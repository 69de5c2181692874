//! Python's methods, and the filters and tests where Jinja2 differs from minijinja.

use std::sync::Arc;

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Kwargs, Rest, Tuple, Value, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State};

use super::json::tojson;
use super::rewrite::PERCENT_FORMAT;
use super::strings::{padding, refuse, splitlines, string_method, strip};
use super::values::{dict, repr, str_of};

/// Make `environment` behave as transformers' Jinja2 environment does.
pub(super) fn install(environment: &mut Environment<'static>) {
    environment.set_unknown_method_callback(method);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_function("dict", new_dict);
    environment.add_filter("tojson", tojson);
    environment.add_filter("trim", trim);
    environment.add_filter("string", |value: &Value| str_of(value));
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_filter("indent", indent);
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    environment.add_filter("wordcount", |text: &str| text.split_whitespace().count());
    environment.add_filter(PERCENT_FORMAT, percent_format);
    environment.add_test("sequence", |value: &Value| {
        matches!(
            value.kind(),
            ValueKind::Undefined | ValueKind::String | ValueKind::Seq | ValueKind::Map
        )
    });
    environment.add_test("iterable", |value: &Value| {
        matches!(
            value.kind(),
            ValueKind::Undefined
                | ValueKind::String
                | ValueKind::Seq
                | ValueKind::Map
                | ValueKind::Iterable
        )
    });
    environment.add_test("number", |value: &Value| {
        matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
    });
}

/// Marks the error of a template that refuses the conversation.
#[derive(Debug)]
pub(super) struct Raised;

impl std::fmt::Display for Raised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("raise_exception")
    }
}

impl std::error::Error for Raised {}

fn raise_exception(message: &Value) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, str_of(message)).with_source(Raised))
}

fn strftime_now(pattern: &str) -> Result<String, Error> {
    use std::fmt::Write as _;
    let mut text = String::new();
    write!(text, "{}", chrono::Local::now().format(pattern))
        .map_err(|_| refuse(format!("strftime_now: {pattern:?} is not a time format")))?;
    Ok(text)
}

fn trim(value: &Value, chars: Option<&str>) -> String {
    strip(&str_of(value), chars, true, true).to_owned()
}

fn new_dict(base: Option<&Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let mut entries: Vec<(Arc<str>, Value)> = Vec::new();
    if let Some(base) = base {
        for key in base.try_iter()? {
            entries.push((str_of(&key).into(), base.get_item(&key)?));
        }
    }
    for name in kwargs.args() {
        entries.retain(|(key, _)| &**key != name);
        entries.push((name.into(), kwargs.get(name)?));
    }
    Ok(dict(entries.into_iter()))
}

/// Jinja2's `int`: what is no number is the default.
fn int(value: &Value, default: Option<Value>) -> Value {
    let truncated = |number: f64| {
        // Beyond i64 a template has no use for the exact number.
        if number.is_finite() {
            Some(number.trunc() as i64)
        } else {
            None
        }
    };
    let parsed = match value.as_str() {
        Some(text) => {
            let digits = text.trim().replace('_', "");
            digits
                .parse()
                .ok()
                .or_else(|| truncated(digits.parse().ok()?))
        }
        None if value.kind() == ValueKind::Bool => Some(i64::from(value.is_true())),
        None => value
            .as_i64()
            .or_else(|| truncated(f64::try_from(value.clone()).ok()?)),
    };
    parsed.map_or_else(|| default.unwrap_or_else(|| Value::from(0)), Value::from)
}

/// Jinja2's `float`: what is no number is the default.
fn float(value: &Value, default: Option<Value>) -> Value {
    let parsed = match value.as_str() {
        Some(text) => text.trim().parse().ok(),
        None if value.kind() == ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        None => f64::try_from(value.clone()).ok(),
    };
    parsed.map_or_else(|| default.unwrap_or_else(|| Value::from(0.0)), Value::from)
}

/// Jinja2's `indent(width=4, first=False, blank=False)`, which also makes every line end a newline.
fn indent(value: &Value, given: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let argument = |position: usize, name: &str| match given.get(position) {
        Some(value) => Ok(Some(value.clone())),
        None => kwargs.get::<Option<Value>>(name),
    };
    let width = argument(0, "width")?;
    let first = argument(1, "first")?.is_some_and(|first| first.is_true());
    let blank = argument(2, "blank")?.is_some_and(|blank| blank.is_true());
    kwargs.assert_all_used()?;
    let space = match &width {
        None => "    ".to_owned(),
        Some(width) => match width.as_str() {
            Some(text) => text.to_owned(),
            None => padding("", width.as_usize().unwrap_or(0), ' ')?,
        },
    };
    let text = str_of(value) + "\n";
    let mut out = String::new();
    for (index, line) in splitlines(&text, false).iter().enumerate() {
        let line = line.as_str().unwrap_or_default();
        if index > 0 {
            out.push('\n');
        }
        let indented = if index == 0 {
            first
        } else {
            blank || !line.is_empty()
        };
        if indented {
            out.push_str(&space);
        }
        out.push_str(line);
    }
    Ok(out)
}

/// Python's `len`, and 0 for what is undefined.
fn length(value: &Value) -> Result<usize, Error> {
    if value.is_undefined() {
        return Ok(0);
    }
    let none = || refuse(format!("a value of type {} has no length", value.kind()));
    value.len().ok_or_else(none)
}

/// `format % operand` of Python: a tuple gives many values, anything else one.
fn percent_format(text: &Value, operand: &Value) -> Result<Value, Error> {
    let pattern = text
        .as_str()
        .ok_or_else(|| refuse("'%' formats strings only".to_owned()))?;
    let values = match operand.downcast_object_ref::<Tuple>() {
        Some(_) => operand.try_iter()?.map(printable).collect(),
        None => vec![printable(operand.clone())],
    };
    format(FormatStyle::Printf, pattern, &values).map(Value::from)
}

/// Containers as Python's text of them; the rest as it is.
fn printable(value: Value) -> Value {
    match value.kind() {
        ValueKind::Seq | ValueKind::Map | ValueKind::Iterable => Value::from(repr(&value)),
        _ => value,
    }
}

fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        if let Some(result) = string_method(text, name, args)? {
            return Ok(result);
        }
    } else if value.kind() == ValueKind::Map && name == "get" {
        let (key, default): (&Value, Option<&Value>) = from_args(args)?;
        let found = value.get_item(key)?;
        return Ok(match (found.is_undefined(), default) {
            (false, _) => found,
            (true, Some(default)) => default.clone(),
            (true, None) => Value::from(()),
        });
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}
