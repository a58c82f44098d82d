// What the page says of a run, in the language that ComfyUI is set to. {name} stands for a value.

const WORDS = {
    en: {
        finish: "Finish now", open: "Open run", nothing: "Run “{run}” has not begun.", linked: "Shows its run once it has begun.",
        training: "Step {step} of {steps}", stage: "{stage}, {done} of {of}", stageAlone: "{stage}", left: "about {time} left",
        stopped: "Stopped at step {step} of {steps}. Run the same again: it goes on there.", prepared: "Prepared. Run it again to go on.",
        finished: "Finished after {step} steps: held-out error {error}, {times} times below the {cut}.",
        finishedPlain: "Finished after {step} steps. The report says what was reached.",
        loss: "loss", error: "held-out error", best: "best",
        device: "Memory {used} of {total}, at most {peak}", process: "ComfyUI {process}", lost: "Connection lost. If ComfyUI still runs, so does the job.",
        teacher: "teacher", student: "student", step: "step {step}", seconds: "{n} s", minutes: "{n} min", hours: "{n} h",
        finishTip: "Ends the training now with the best student so far, and the graph goes on. "
            + "Cancel stops the graph instead, and running it again goes on with the training.",
        openTip: "Everything about this run in a page of its own: chart, clips, report, where it lies.",
        finishing: "Finishing", finishingDetail: "This run ends with the best student so far, and the graph goes on.", notFinished: "Not finished",
        disk: "Disk: runs {runs}, answers {answers}, starts {starts}; {free} free", clear: "Clear…", clearTitle: "Clear what WanLite keeps?",
        clearTip: "Deletes runs, the teacher’s answers and untrained starts. What you saved with WanLite Save Student, banks and exports stay.",
        clearMessage: "{size} of runs, of the teacher’s answers and of untrained starts are deleted, but for what a job works on. "
            + "Saved students, prompt banks and exports stay.",
        unsaved: "Its student is saved nowhere else: {names}", unfinished: "Trained, and not finished: {names}", cleared: "{size} cleared", report: "Report", clips: "Clips", folder: "Where it lies", settings: "Settings",
        "short plain cut of the same size": "plain cut", "short teacher without guidance": "teacher without cfg", "short untrained student": "untrained",
        "short LoRA as it was": "LoRA as it was",
    },
    zh: {
        finish: "立即完成", open: "查看运行", nothing: "运行“{run}”尚未开始。", linked: "运行后在此显示。",
        training: "第 {step} / {steps} 步", stage: "{stage}，{done} / {of}", stageAlone: "{stage}", left: "约剩 {time}",
        stopped: "停在第 {step} / {steps} 步。再次运行即可继续。", prepared: "已准备好。再次运行即可继续。",
        finished: "{step} 步后完成：留出误差 {error}，为{cut}的 1/{times}。",
        finishedPlain: "{step} 步后完成。结果见报告。",
        loss: "损失", error: "留出误差", best: "最佳",
        device: "显存/内存 {used} / {total}，峰值 {peak}", process: "ComfyUI {process}", lost: "连接已断开。只要 ComfyUI 还在运行，任务就会继续。",
        teacher: "教师", student: "学生", step: "第 {step} 步", seconds: "{n} 秒", minutes: "{n} 分钟", hours: "{n} 小时",
        finishTip: "立即结束训练，采用目前最好的学生模型，工作流继续。“取消”则停止整个工作流，再次运行会继续训练。",
        openTip: "在单独页面查看此运行：曲线、片段、报告和所在位置。",
        finishing: "正在完成", finishingDetail: "此运行以目前最好的学生模型结束，工作流继续。", notFinished: "未能完成",
        disk: "磁盘：运行 {runs}，答案 {answers}，起点 {starts}；剩余 {free}", clear: "清理…", clearTitle: "清理 WanLite 保留的文件？",
        clearTip: "删除运行、教师的答案和未训练的起点。用 WanLite Save Student 保存的模型、提示词库和导出文件会保留。",
        clearMessage: "将删除 {size} 的运行、教师答案和未训练的起点，正在使用的除外。已保存的学生模型、提示词库和导出文件会保留。",
        unsaved: "学生模型未在别处保存：{names}", unfinished: "训练过但未完成：{names}", cleared: "已清理 {size}", report: "报告", clips: "片段", folder: "所在位置", settings: "设置",
        "short plain cut of the same size": "直接裁剪", "short teacher without guidance": "无引导教师", "short untrained student": "未训练",
        "short LoRA as it was": "原 LoRA",
        "asking the teacher": "询问教师模型", "loading the student": "加载学生模型", "evaluating": "评估", "evaluating the start": "评估起点",
        "evaluating the plain cut": "评估直接裁剪", "cutting the plain cut": "直接裁剪", "measuring the speed": "测速", "drawing a sample": "生成样片",
        "loading the best": "加载最佳权重", "evaluating what is handed out": "评估最终学生模型", "writing the student": "写入学生模型", saving: "保存",
        "plain cut of the same size": "同尺寸直接裁剪", "teacher without guidance": "无引导的教师", "untrained student": "未训练的学生", "LoRA as it was": "原 LoRA",
    },
};

/** The words of a language, as say("left", { time: "3 min" }). What the engine calls a stage comes back as it is where there is no word for it. */
export function wordsOf(language) {
    const words = String(language).startsWith("zh") ? WORDS.zh : WORDS.en;
    return (key, values = {}) => (words[key] ?? WORDS.en[key] ?? key).replace(/\{(\w+)\}/g, (_, name) => values[name] ?? "");
}

export function duration(say, seconds) {
    if (seconds < 90) return say("seconds", { n: Math.max(1, Math.round(seconds)) });
    return seconds < 5400 ? say("minutes", { n: Math.round(seconds / 60) }) : say("hours", { n: (seconds / 3600).toFixed(1) });
}

/** A line with these names, or none where there are none; of many the first. */
export function listed(say, key, names) {
    const most = 8;
    return names.length ? [say(key, { names: names.slice(0, most).join(", ") + (names.length > most ? ", …" : "") })] : [];
}

export function gib(bytes) {
    return bytes >= 2 ** 29 ? `${(bytes / 2 ** 30).toFixed(1)} GiB` : `${Math.round(bytes / 2 ** 20)} MiB`;
}

/** Where a clip [step, when it was written] is; a later run of the same name has others. */
export const clipAddress = (run, [step, written]) => `/wanlite/clip?${new URLSearchParams({ run, step, written })}`;

/** What it shows. beside: whether the teacher's is beside the student's. */
export function captionOf(say, step, beside) {
    return `${beside ? `${say("teacher")} | ` : ""}${say("student")} · ${say("step", { step })}`;
}

/** Where a run is, in a sentence. */
export function status(say, run) {
    if (!run?.run) return say("linked");
    if (run.running) {
        const sayStage = run.of > 1 ? "stage" : "stageAlone";
        const at = run.stage === "training" ? say("training", run) : say(sayStage, { ...run, stage: stageOf(say, run.stage || "loading the student") });
        return run.left === null ? at : `${at} · ${say("left", { time: duration(say, run.left) })}`;
    }
    if (run.report) {
        const error = Math.min(...run.errors.map(([, value]) => value)), times = run.plain_cut / error;
        const told = { step: run.step, error: Number(error.toPrecision(3)), times: times.toFixed(1), cut: say(run.yardstick) };
        return say(Number.isFinite(times) && times >= 1.05 ? "finished" : "finishedPlain", told);
    }
    return run.step ? say("stopped", run) : say(run.begun ? "prepared" : "nothing", run);
}

/** What the engine calls a stage, as a sentence begins. Of "saving 1.2 GiB" the size is no word. */
function stageOf(say, stage) {
    const [, verb, size] = /^(saving) (.+)$/.exec(stage) ?? [, stage, ""];
    return sentence(`${say(verb)} ${size}`.trim());
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);
