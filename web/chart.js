// A run as a chart: training loss, held-out error at each evaluation, and the plain cut's error as a line. Both scales for both themes.

const ERROR = "#e8590c";
const CUT = "#2f9e44";
const FAINT = 0.45; // of the text's colour: the training loss

const LEFT = 40, RIGHT = 10, TOP = 8, BOTTOM = 18; // pixels around the plot
const NARROW = 200; // pixels with no room for a number in the middle
const APART = 18; // pixels between numbers of the scale

/** Draws `run` (what /wanlite/run answers) into a canvas that is `width` x `height` CSS pixels, in the colour of the text around it. */
export function draw(canvas, run, width, height) {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.font = "10px sans-serif";
    context.lineJoin = "round";
    const ink = getComputedStyle(canvas).color;
    const curve = positive(run.curve), errors = positive(run.errors);
    const cut = run.plain_cut > 0 ? [[0, run.plain_cut]] : [];
    const place = axes(context, [...curve, ...errors, ...cut].map(([, value]) => value), Math.max(run.steps, run.step, 1), width, height, ink);
    context.globalAlpha = FAINT;
    line(context, curve.map(place), ink, 1.25);
    context.globalAlpha = 1;
    for (const [, value] of cut) {
        const y = place([0, value])[1];
        context.setLineDash([6, 4]);
        line(context, [[LEFT, y], [width - RIGHT, y]], CUT, 1.5);
        context.setLineDash([]);
    }
    line(context, errors.map(place), ERROR, 2);
    for (const [x, y] of errors.map(place)) {
        context.beginPath();
        context.arc(x, y, 2.5, 0, 2 * Math.PI);
        context.fillStyle = ERROR;
        context.fill();
    }
}

const positive = (points) => points.filter(([, value]) => value > 0);

/** Grid and numbers; returns the function from [step, value] to pixels. The values' scale is logarithmic. */
function axes(context, values, steps, width, height, ink) {
    const low = Math.log10(Math.min(...values, 1)) - 0.05, high = Math.log10(Math.max(...values, values.length ? 0 : 1)) + 0.05;
    const [bottom, top] = values.length ? [Math.log10(Math.min(...values)) - 0.05, high] : [low - 1, high];
    const place = ([step, value]) => [
        LEFT + (step / steps) * (width - LEFT - RIGHT),
        height - BOTTOM - ((Math.log10(value) - bottom) / (top - bottom)) * (height - TOP - BOTTOM)];
    context.fillStyle = context.strokeStyle = ink;
    context.textBaseline = "middle";
    context.textAlign = "right";
    let last = Infinity;
    for (const value of ticks(bottom, top)) {
        const y = place([0, value])[1];
        if (last - y < APART) continue;
        last = y;
        context.globalAlpha = 0.12;
        line(context, [[LEFT, y], [width - RIGHT, y]], ink, 1);
        context.globalAlpha = 0.75;
        context.fillText(short(value), LEFT - 5, y);
    }
    context.textBaseline = "top";
    for (const [share, align] of [[0, "left"], [0.5, "center"], [1, "right"]]) {
        if (share === 0.5 && width < NARROW) continue;
        context.textAlign = align;
        context.fillText(Math.round(share * steps).toLocaleString("en"), LEFT + share * (width - LEFT - RIGHT), height - BOTTOM + 5);
    }
    context.globalAlpha = 0.4;
    line(context, [[LEFT, TOP], [LEFT, height - BOTTOM], [width - RIGHT, height - BOTTOM]], ink, 1);
    context.globalAlpha = 1;
    return place;
}

/** Round numbers between two powers of ten: 1, 2 and 5 of each, or evenly spread ones where these are too far apart. */
function ticks(bottom, top) {
    const found = [];
    for (let power = Math.floor(bottom); power <= Math.ceil(top); power++) {
        for (const first of [1, 2, 5]) {
            const value = first * 10 ** power;
            if (Math.log10(value) >= bottom && Math.log10(value) <= top) found.push(value);
        }
    }
    return found.length > 1 ? found : [0.1, 0.5, 0.9].map((share) => 10 ** (bottom + share * (top - bottom)));
}

/** What the lines are and where they stand now, as elements; `say` as wordsOf gives it. */
export function legendOf(say, run) {
    const last = (points) => points.at(-1)?.[1];
    const best = Math.min(...run.errors.map(([, error]) => error));
    const entries = [
        ["currentColor", FAINT, say("loss"), last(run.curve)],
        [ERROR, 1, say("error"), last(run.errors), run.errors.length > 1 ? ` (${say("best")} ${short(best)})` : ""],
        [CUT, 1, say(`short ${run.yardstick}`), run.plain_cut]];
    return entries.filter(([, , , value]) => value > 0).map(([colour, opacity, name, value, more = ""]) => {
        const entry = document.createElement("span"), mark = document.createElement("span");
        Object.assign(mark.style, { display: "inline-block", width: "12px", height: "3px", margin: "0 4px 3px 0", background: colour, opacity });
        entry.append(mark, `${name} ${short(value)}${more}\u2002`);
        return entry;
    });
}

/** A number in three digits at most. */
function short(value) {
    return value >= 1000 || value < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}

function line(context, points, colour, width) {
    context.beginPath();
    points.forEach(([x, y], index) => (index ? context.lineTo(x, y) : context.moveTo(x, y)));
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.stroke();
}
