use eggs_crossdir_model::*;
use Weakness::*;

fn scenarios(crashes: u8) -> Vec<(&'static str, Scenario)> {
    let s = |parents: &[u8]| Scenario::new(parents, crashes);
    vec![
        ("swap", s(&[0, 0]).moved(1, 0, 2).moved(2, 0, 1)),
        ("loop12", s(&[0, 1]).moved(1, 0, 2).moved(2, 1, 0)),
        ("loop21", s(&[0, 1]).moved(2, 1, 0).moved(1, 0, 2)),
        ("deep", s(&[0, 0, 1, 2]).moved(1, 0, 4).moved(2, 0, 3)),
        ("exists", s(&[0, 0, 0]).rename(1, (0, 1), (3, 9)).rename(2, (0, 2), (3, 9))),
        ("rm", s(&[0, 1, 0]).moved(2, 1, 0).rmdir(1, 0).moved(3, 0, 2)),
        ("rm2", s(&[0, 1, 0]).moved(3, 0, 2).moved(2, 1, 0).rmdir(1, 0)),
        ("three", s(&[0, 0, 0]).moved(1, 0, 2).moved(2, 0, 3).moved(3, 0, 1)),
    ]
}

#[test]
fn explore() {
    let crashes: u8 = std::env::var("CRASHES").ok().map_or(1, |v| v.parse().unwrap());
    let only = std::env::var("ONLY").unwrap_or_default();
    let mut list = vec![None];
    if std::env::var("WEAK").is_ok() {
        list = [
            ClearWithoutClaims, HalfClaims, ForgetWhatWasOver, RefuseUnchecked, OvertakeWaiting, DropClaims,
            EmptyClaims, ClearedKeepTheirPlace, NoTakeOver, LateTakeOver, AdoptNothing, StepBeforeRecorded,
            AnswerBeforeRecorded, LateRefusals, RefuseUncleared, FinishDoesNotStop, ClearTheFinished,
        ].into_iter().map(Some).collect();
    }
    for weakness in list {
        for (name, scenario) in scenarios(crashes) {
            if !only.is_empty() && !only.split(',').any(|o| o == name) { continue }
            let begun = std::time::Instant::now();
            let found = search(&Protocol { scenario, weakness }, 6_000_000);
            println!("{weakness:?} {name}: {} states, depth {}, {} ends, {:.1} s: {}", found.states, found.depth,
                found.ends, begun.elapsed().as_secs_f64(),
                found.counterexample.as_deref().map_or("ok".into(), |c| if std::env::var("TRACE").is_ok() { c.to_owned() } else { c.lines().next().unwrap().to_owned() }));
        }
    }
}
