//! HTML: text is escaped wherever it comes from; only what this program wrote itself is markup.

use std::collections::HashMap;

use serde::Serialize;

use crate::picture::canvas::Canvas;

/// A piece of markup.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Html(String);

impl Html {
    /// Markup of this program.
    pub fn trusted(text: &'static str) -> Self {
        Self(text.to_owned())
    }

    /// Begins an element.
    pub fn open(&mut self, tag: &'static str, attributes: &[(&'static str, &str)]) -> &mut Self {
        self.0 += &format!("<{tag}");
        for (name, value) in attributes {
            self.0 += &format!(" {name}=\"{}\"", escaped(value));
        }
        self.0.push('>');
        self
    }

    /// Ends an element.
    pub fn close(&mut self, tag: &'static str) -> &mut Self {
        self.0 += &format!("</{tag}>");
        self
    }

    /// Text.
    pub fn text(&mut self, text: &str) -> &mut Self {
        self.0 += &escaped(text);
        self
    }

    /// Text in which `words` between backticks are code.
    pub fn prose(&mut self, text: &str) -> &mut Self {
        for (index, part) in text.split('`').enumerate() {
            if index % 2 == 1 {
                self.open("code", &[]).text(part).close("code");
            } else {
                self.text(part);
            }
        }
        self
    }

    /// Another piece.
    pub fn append(&mut self, other: &Self) -> &mut Self {
        self.0 += &other.0;
        self
    }

    /// A picture inside the page, at its own size or smaller.
    ///
    /// # Errors
    /// The encoder's.
    pub fn image(&mut self, picture: &Canvas, description: &str) -> Result<&mut Self, image::ImageError> {
        let source = format!("data:image/png;base64,{}", base64(&picture.to_png()?));
        let (width, height) = (picture.width().to_string(), picture.height().to_string());
        let attributes =
            [("src", source.as_str()), ("width", &width), ("height", &height), ("alt", description)];
        Ok(self.open("img", &attributes))
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A list of sentences; nothing if there is none.
    pub fn list(class: &'static str, lines: &[String]) -> Self {
        let mut html = Self::default();
        if !lines.is_empty() {
            html.open("ul", &[("class", class)]);
            for line in lines {
                html.open("li", &[]).prose(line).close("li");
            }
            html.close("ul");
        }
        html
    }

    /// Text as it stands.
    pub fn pre(text: &str) -> Self {
        let mut html = Self::default();
        html.open("pre", &[]).text(text).close("pre");
        html
    }

    /// A value as JSON that is safe inside `<script>`.
    pub fn json(value: &impl Serialize) -> Self {
        let text = serde_json::to_string(value).unwrap_or_else(|_| "null".into());
        // inside strings alone; `</script>` and `<!--` would end or change the element
        Self(text.replace('<', "\\u003c").replace('>', "\\u003e").replace('&', "\\u0026"))
    }

    /// The markup.
    pub fn into_string(self) -> String {
        self.0
    }

    #[cfg(test)]
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

/// `&`, `<`, `>` and both quotes as entities; control characters, which HTML forbids, as replacement characters.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + text.len() / 16);
    for character in text.chars() {
        match character {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            '\n' | '\t' => out.push(character),
            c if c.is_control() => out.push(char::REPLACEMENT_CHARACTER),
            c => out.push(c),
        }
    }
    out
}

/// RFC 4648, with padding.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let [a, b, c] = [0, 1, 2].map(|i| u32::from(group.get(i).copied().unwrap_or(0)));
        let bits = a << 16 | b << 8 | c;
        for digit in 0..4 {
            let value = (bits >> (18 - 6 * digit)) as usize & 63;
            out.push(if digit <= group.len() { char::from(DIGITS[value]) } else { '=' });
        }
    }
    out
}

/// What stands in the places `{{name}}` of a template.
#[derive(Debug, Default)]
pub struct Slots(HashMap<&'static str, String>);

impl Slots {
    /// Text, escaped.
    pub fn text(&mut self, name: &'static str, text: &str) {
        self.0.insert(name, escaped(text));
    }

    /// Markup.
    pub fn html(&mut self, name: &'static str, html: Html) {
        self.0.insert(name, html.0);
    }

    /// The template with every place filled, in one pass: what is put in is not looked at again. A place without content
    /// stays empty, and `{{?name}}…{{/name}}` vanishes with it.
    pub fn fill(&self, template: &str) -> String {
        let mut out = String::with_capacity(template.len() + self.0.values().map(String::len).sum::<usize>());
        let mut rest = template;
        while let Some((before, after)) = rest.split_once("{{") {
            out += before;
            let Some((name, after)) = after.split_once("}}") else {
                rest = after;
                break;
            };
            rest = after;
            if let Some(name) = name.strip_prefix('?') {
                let full = self.0.get(name).is_some_and(|content| !content.is_empty());
                if !full && let Some((_, behind)) = rest.split_once(&format!("{{{{/{name}}}}}")) {
                    rest = behind;
                }
            } else if let Some(content) = self.0.get(name) {
                out += content;
            }
        }
        out + rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_become_markup() {
        let mut html = Html::default();
        html.open("a", &[("title", "\"><script>")]).text("<b>&'\u{0}x").close("a");
        assert_eq!(html.as_str(), "<a title=\"&quot;&gt;&lt;script&gt;\">&lt;b&gt;&amp;&#39;\u{fffd}x</a>");
        let mut html = Html::default();
        html.prose("lower `a<b` or `c");
        assert_eq!(html.as_str(), "lower <code>a&lt;b</code> or <code>c</code>");
        let json = Html::json(&"</script><!-- &");
        assert_eq!(json.as_str(), "\"\\u003c/script\\u003e\\u003c!-- \\u0026\"");
        assert_eq!(serde_json::from_str::<String>(json.as_str()).unwrap(), "</script><!-- &");
    }

    #[test]
    fn base64_is_that_of_the_standard() {
        for (bytes, text) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")]
        {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
        assert_eq!(base64(&[0xfb, 0xff]), "+/8=");
    }

    #[test]
    fn places_are_filled_once() {
        let mut slots = Slots::default();
        slots.text("a", "{{b}}<");
        slots.text("b", "B");
        slots.text("none", "");
        let template =
            "1{{a}}2{{b}}3{{?b}}yes{{/b}}{{?none}}no {{a}}{{/none}}{{?other}}no{{/other}}4{{unknown}}";
        assert_eq!(slots.fill(template), "1{{b}}&lt;2B3yes4");
        assert_eq!(slots.fill("broken {{a"), "broken a");
    }
}
