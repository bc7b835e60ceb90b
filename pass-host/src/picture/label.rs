//! Text on a canvas.

use std::sync::LazyLock;

use ab_glyph::{Font, FontRef, Glyph, Point, PxScale, ScaleFont, point};

use super::canvas::Canvas;
use super::colors::Rgb;

/// What stands for the part of a text that has no room.
const ELLIPSIS: char = '…';

/// Weight of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weight {
    /// Captions.
    Regular,
    /// Titles.
    Medium,
}

/// How a text looks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Style {
    /// Height of a line in pixels.
    pub size: f32,
    /// Weight.
    pub weight: Weight,
    /// Color.
    pub color: Rgb,
}

/// Where a text stands relative to its point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Begins there.
    Left,
    /// Is centered there.
    Center,
    /// Ends there.
    Right,
}

static REGULAR: LazyLock<FontRef<'static>> =
    LazyLock::new(|| font(include_bytes!("fonts/Roboto-Regular.ttf")));
static MEDIUM: LazyLock<FontRef<'static>> = LazyLock::new(|| font(include_bytes!("fonts/Roboto-Medium.ttf")));

fn font(bytes: &'static [u8]) -> FontRef<'static> {
    FontRef::try_from_slice(bytes).expect("the fonts that come with the program are whole")
}

impl Style {
    fn font(&self) -> &'static FontRef<'static> {
        match self.weight {
            Weight::Regular => &REGULAR,
            Weight::Medium => &MEDIUM,
        }
    }

    fn advance(&self, character: char) -> f32 {
        let font = self.font().as_scaled(PxScale::from(self.size));
        font.h_advance(font.glyph_id(character))
    }

    /// Width of a text in pixels.
    pub fn width(&self, text: &str) -> f32 {
        text.chars().map(|character| self.advance(character)).sum()
    }

    /// Pixels from one line to the next.
    pub fn line(&self) -> usize {
        (self.size * 1.15).ceil() as usize
    }

    /// The text cut to `width` pixels: its end is kept, since names differ there.
    pub fn fitted(&self, text: &str, width: f32) -> String {
        if self.width(text) <= width {
            return text.to_owned();
        }
        let mut room = width - self.advance(ELLIPSIS);
        let mut kept: Vec<char> = Vec::new();
        for character in text.chars().rev() {
            room -= self.advance(character);
            if room < 0.0 {
                break;
            }
            kept.push(character);
        }
        kept.push(ELLIPSIS);
        kept.iter().rev().collect()
    }

    /// The text in lines of at most `width` pixels, broken at spaces; a word that is longer is cut.
    pub fn wrapped(&self, text: &str, width: f32) -> Vec<String> {
        let mut lines: Vec<String> = Vec::new();
        for word in text.split_whitespace() {
            let longer = lines.last().map(|line| format!("{line} {word}"));
            match (lines.last_mut(), longer) {
                (Some(line), Some(longer)) if self.width(&longer) <= width => *line = longer,
                _ => lines.push(self.fitted(word, width)),
            }
        }
        lines
    }
}

impl Canvas {
    /// Writes one line whose upper edge is at row `top`; returns its width in pixels. Control characters are left out.
    pub fn write(&mut self, text: &str, x: usize, top: usize, align: Align, style: Style) -> usize {
        let font = style.font().as_scaled(PxScale::from(style.size));
        let width = style.width(text);
        let start = match align {
            Align::Left => x as f32,
            Align::Center => x as f32 - width / 2.0,
            Align::Right => x as f32 - width,
        };
        // whole pixels: the strokes of equal letters then look equal
        let mut pen: Point = point(start.round(), (top as f32 + font.ascent()).round());
        for character in text.chars().filter(|character| !character.is_control()) {
            let glyph: Glyph = font.glyph_id(character).with_scale_and_position(style.size, pen);
            pen.x += style.advance(character);
            if let Some(outline) = font.font.outline_glyph(glyph) {
                let corner = outline.px_bounds().min;
                outline.draw(|x, y, coverage| {
                    let (x, y) = (corner.x + x as f32, corner.y + y as f32);
                    if x >= 0.0 && y >= 0.0 {
                        self.mix(x as usize, y as usize, style.color, coverage.min(1.0));
                    }
                });
            }
        }
        width.ceil() as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::picture::canvas::Rect;

    const STYLE: Style = Style { size: 20.0, weight: Weight::Regular, color: [0; 3] };

    fn ink(canvas: &Canvas, area: Rect) -> usize {
        let columns = |y| (area.left..area.right).filter(move |x| canvas.get(*x, y)[0] < 128);
        (area.top..area.bottom).map(|y| columns(y).count()).sum()
    }

    #[test]
    fn text_is_drawn_where_it_is_aligned() {
        for (align, from, to) in [(Align::Left, 100, 200), (Align::Right, 0, 100), (Align::Center, 50, 150)] {
            let mut canvas = Canvas::new(200, 30, [255; 3]);
            let width = canvas.write("Attention", 100, 2, align, STYLE);
            assert!((60..100).contains(&width), "{width}");
            let (all, inside) =
                (ink(&canvas, canvas.bounds()), ink(&canvas, Rect::at(from, 2, to - from, 24)));
            assert!(all > 100 && inside == all, "{align:?}: {inside} of {all}");
        }
    }

    #[test]
    fn what_has_no_room_is_cut_at_the_beginning() {
        let cut = STYLE.fitted("photos/holiday/cat.jpg", 90.0);
        assert!(cut.starts_with('…') && cut.ends_with("cat.jpg"), "{cut}");
        assert!(STYLE.width(&cut) <= 90.0);
        assert_eq!(STYLE.fitted("cat", 90.0), "cat");
        assert_eq!(STYLE.fitted("cat", 0.0), "…");
    }

    #[test]
    fn lines_are_broken_at_spaces() {
        let lines = STYLE.wrapped("one two three four five", 90.0);
        assert_eq!(lines.join(" "), "one two three four five");
        assert!(lines.len() > 1 && lines.iter().all(|line| STYLE.width(line) <= 90.0), "{lines:?}");
        assert!(STYLE.wrapped("", 90.0).is_empty());
    }

    #[test]
    fn strange_text_and_places_do_no_harm() {
        let mut canvas = Canvas::new(20, 10, [255; 3]);
        canvas.write("\u{0}\n\u{1F980}漢字 <&>\u{202e}", 300, 300, Align::Left, STYLE);
        canvas.write("漢字", 0, 0, Align::Center, STYLE);
        canvas.write("x", 3, 0, Align::Right, Style { size: 0.5, ..STYLE });
    }
}
