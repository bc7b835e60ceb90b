//! Results of evaluations and bad images as tables.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use super::page::Html;

/// Rows of a table that are shown.
const MOST_ROWS: usize = 300;
/// Nesting of results that is followed.
const MOST_NESTED: usize = 4;

/// Bad images and why.
#[derive(Clone, Debug, Default)]
pub struct BadImages(Vec<(String, String)>);

/// Reads `quarantine.tsv`.
pub fn bad_images(bytes: &[u8]) -> BadImages {
    let text = String::from_utf8_lossy(bytes);
    let line = |line: &str| line.split_once('\t').map(|(name, reason)| (name.to_owned(), reason.to_owned()));
    BadImages(text.lines().filter_map(line).collect())
}

impl BadImages {
    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// As a table; nothing if there is none.
    pub fn html(&self) -> Html {
        if self.is_empty() {
            return Html::default();
        }
        let rows: Vec<Vec<String>> =
            self.0.iter().map(|(name, reason)| vec![name.clone(), reason.clone()]).collect();
        table(&["image".into(), "reason".into()], &rows)
    }
}

/// The `*.json` files of a folder, each as a table of its numbers and one for each list of objects; and what could not be
/// read. A folder that is not there is empty.
pub fn evaluations(folder: &Path) -> (Html, Vec<String>) {
    let (mut html, mut unreadable) = (Html::default(), Vec::new());
    let Ok(entries) = fs::read_dir(folder) else { return (html, unreadable) };
    let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    files.sort();
    for path in files {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let value = fs::read(&path)
            .map_err(|error| error.to_string())
            .and_then(|bytes| serde_json::from_slice::<Value>(&bytes).map_err(|error| error.to_string()));
        match value {
            Ok(value) => {
                html.open("h3", &[]).text(&name).close("h3");
                html.append(&result(&value));
            }
            Err(error) => unreadable.push(format!("evaluation `{name}.json` cannot be read: {error}")),
        }
    }
    (html, unreadable)
}

/// One result: its scalars, then its lists of objects.
fn result(value: &Value) -> Html {
    let (mut scalars, mut lists) = (Vec::new(), Vec::new());
    match value {
        Value::Object(_) => collect("", value, 0, &mut scalars, &mut lists),
        Value::Array(rows) => lists.push((String::new(), rows)),
        other => scalars.push((String::from("result"), shown(other))),
    }
    let mut html = Html::default();
    if !scalars.is_empty() {
        let (names, values): (Vec<String>, Vec<String>) = scalars.into_iter().unzip();
        if names.len() <= 8 {
            html.append(&table(&names, &[values]));
        } else {
            let rows: Vec<Vec<String>> =
                names.into_iter().zip(values).map(|(name, value)| vec![name, value]).collect();
            html.append(&table(&["".into(), "value".into()], &rows));
        }
    }
    for (name, rows) in lists {
        if !name.is_empty() {
            html.open("h4", &[]).text(&name).close("h4");
        }
        html.append(&list(rows));
    }
    html
}

fn collect<'a>(
    prefix: &str,
    value: &'a Value,
    depth: usize,
    scalars: &mut Vec<(String, String)>,
    lists: &mut Vec<(String, &'a Vec<Value>)>,
) {
    match value {
        Value::Object(object) if depth < MOST_NESTED => {
            for (key, value) in object {
                let name = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                collect(&name, value, depth + 1, scalars, lists);
            }
        }
        Value::Array(rows) if rows.iter().any(Value::is_object) => lists.push((prefix.to_owned(), rows)),
        other => scalars.push((prefix.to_owned(), shown(other))),
    }
}

/// A list of objects, one a row, every key that occurs a column.
fn list(rows: &[Value]) -> Html {
    let mut columns: Vec<String> = Vec::new();
    let objects: Vec<&Map<String, Value>> = rows.iter().filter_map(Value::as_object).collect();
    for key in objects.iter().flat_map(|object| object.keys()) {
        if !columns.contains(key) {
            columns.push(key.clone());
        }
    }
    // names before numbers
    columns.sort_by_key(|column| {
        let first = objects.iter().find_map(|object| object.get(column).filter(|value| !value.is_null()));
        !first.is_some_and(Value::is_string)
    });
    let row = |object: &&Map<String, Value>| {
        columns.iter().map(|column| object.get(column).map_or(String::new(), shown)).collect()
    };
    let rows: Vec<Vec<String>> = objects.iter().map(row).collect();
    table(&columns, &rows)
}

/// A value in few characters.
fn shown(value: &Value) -> String {
    match value {
        Value::Null => "–".into(),
        Value::String(text) => text.clone(),
        Value::Number(number) => match number.as_f64() {
            Some(float) if !number.is_i64() && !number.is_u64() => format!("{float:.4}"),
            _ => number.to_string(),
        },
        Value::Array(items) if items.len() <= 8 => items.iter().map(shown).collect::<Vec<_>>().join(", "),
        Value::Array(items) => format!("{} values", items.len()),
        Value::Object(object) => format!("{} entries", object.len()),
        Value::Bool(flag) => if *flag { "yes" } else { "no" }.into(),
    }
}

fn table(columns: &[String], rows: &[Vec<String>]) -> Html {
    let mut html = Html::default();
    html.open("div", &[("class", "scroll")]).open("table", &[]).open("thead", &[]).open("tr", &[]);
    for column in columns {
        html.open("th", &[]).text(column).close("th");
    }
    html.close("tr").close("thead").open("tbody", &[]);
    for row in rows.iter().take(MOST_ROWS) {
        html.open("tr", &[]);
        for cell in row {
            let number = cell.parse::<f64>().is_ok();
            html.open("td", if number { &[("class", "number")] } else { &[] }).text(cell).close("td");
        }
        html.close("tr");
    }
    html.close("tbody").close("table").close("div");
    if rows.len() > MOST_ROWS {
        html.open("p", &[]).text(&format!("and {} more", rows.len() - MOST_ROWS)).close("p");
    }
    html
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_any_form_become_tables() {
        let dir = tempfile::tempdir().unwrap();
        let json = r#"{"J&F_mean":0.61234,"J_mean":0.6,"n":3,"weights":"<run>","deep":{"a":{"b":true}},
            "sequences":[{"name":"dog","J":0.5},{"name":"cat","F":null}],"k":[10,20]}"#;
        fs::write(dir.path().join("vos.json"), json).unwrap();
        fs::write(dir.path().join("knn.json"), "[{\"k\":10,\"top1\":0.25}]").unwrap();
        fs::write(dir.path().join("torn.json"), "{\"a\":").unwrap();
        fs::write(dir.path().join("notes.txt"), "no").unwrap();
        let (html, unreadable) = evaluations(dir.path());
        let html = html.as_str();
        for part in [
            "<h3>knn</h3>",
            "<h3>vos</h3>",
            "<th>J&amp;F_mean</th>",
            "<td class=\"number\">0.6123</td>",
            "<td>&lt;run&gt;</td>",
            "<th>deep.a.b</th>",
            "<h4>sequences</h4>",
            "<td>10, 20</td>",
            "<td>–</td>",
        ] {
            assert!(html.contains(part), "{part} in {html}");
        }
        assert!(unreadable.len() == 1 && unreadable[0].contains("torn.json"), "{unreadable:?}");
        assert_eq!(evaluations(&dir.path().join("none")), (Html::default(), vec![]));
    }

    #[test]
    fn bad_images_are_listed_and_escaped() {
        let list = bad_images(b"/a/<b>.jpg\tnot an image\nno tab\n\xff\tx\n");
        assert_eq!(list.len(), 2);
        assert!(list.html().as_str().contains("<td>/a/&lt;b&gt;.jpg</td><td>not an image</td>"));
        assert!(bad_images(b"").html().is_empty());
    }
}
