//! Draws a group: a bar for each ratio, ours to OpenSSH's, a line at 1, and a mark at the goal.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use super::groups::{Goal, Group};
use super::tables::Summary;

/// Pixels: width of the picture, start of the bars, longest bar, height of a bar with its margin.
const WIDTH: u32 = 880;
const LEFT: i32 = 340;
const LENGTH: f64 = 420.0;
const TOP: i32 = 64;
const BAR: i32 = 30;
/// Bars end at this ratio; the figure next to the bar shows the true one.
const MOST: f64 = 4.0;
const MET: RGBColor = RGBColor(46, 125, 50);
const MISSED: RGBColor = RGBColor(198, 40, 40);
const NO_GOAL: RGBColor = RGBColor(120, 144, 156);

/// Draws the picture.
///
/// # Errors
/// If the file can't be written.
pub(super) fn write(file: &Path, group: &Group, summaries: &[Summary]) -> Result<()> {
    draw(file, group, summaries).map_err(|error| anyhow!("drawing {}: {error}", file.display()))
}

fn draw(file: &Path, group: &Group, summaries: &[Summary]) -> Result<(), Box<dyn std::error::Error>> {
    let bottom = TOP + BAR * i32::try_from(summaries.len())?;
    let area = SVGBackend::new(file, (WIDTH, u32::try_from(bottom)? + 24)).into_drawing_area();
    area.fill(&WHITE)?;
    let text = |size: i32| ("sans-serif", size).into_font().color(&BLACK);
    area.draw(&Text::new(group.title, (12, 12), text(18)))?;
    let legend = "ours / OpenSSH in the same run; thin: all rounds; dashed: alike; blue: goal";
    area.draw(&Text::new(legend, (12, 38), text(12)))?;
    let reach = |summary: &Summary| summary.range[1].max(goal(summary).unwrap_or_default()).min(MOST);
    let most = summaries.iter().map(reach).fold(1.1, f64::max);
    let x = |ratio: f64| LEFT + (ratio.clamp(0.0, most) / most * LENGTH).round() as i32;
    for (at, summary) in (0..).zip(summaries) {
        let (top, middle) = (TOP + BAR * at, TOP + BAR * at + BAR / 2);
        let color = match summary.row.goal.reached(summary.ratio) {
            Some(true) => MET,
            Some(false) => MISSED,
            None => NO_GOAL,
        };
        let less = matches!(summary.row.goal, Goal::Most(_) | Goal::LessIsBetter);
        let name = format!("{} ({} is better)", summary.row.name, if less { "less" } else { "more" });
        area.draw(&Text::new(name, (12, middle - 7), text(13)))?;
        area.draw(&Rectangle::new([(LEFT, top + 6), (x(summary.ratio), top + BAR - 6)], color.filled()))?;
        let whisker = summary.range.map(|ratio| (x(ratio), middle));
        area.draw(&PathElement::new(whisker.to_vec(), BLACK))?;
        if let Some(goal) = goal(summary) {
            area.draw(&PathElement::new(
                vec![(x(goal), top + 2), (x(goal), top + BAR - 2)],
                BLUE.stroke_width(3),
            ))?;
        }
        let label_x = x(summary.ratio.max(summary.range[1])) + 8;
        area.draw(&Text::new(format!("{:.2}", summary.ratio), (label_x, middle - 7), text(13)))?;
    }
    for dash in (TOP - 4..bottom + 4).step_by(8) {
        area.draw(&PathElement::new(vec![(x(1.0), dash), (x(1.0), dash + 4)], BLACK))?;
    }
    area.present()?;
    Ok(())
}

fn goal(summary: &Summary) -> Option<f64> {
    match summary.row.goal {
        Goal::Least(goal) | Goal::Most(goal) => Some(goal),
        Goal::MoreIsBetter | Goal::LessIsBetter => None,
    }
}
